"""What kvc8-quantize says of the tiny models of the tests."""

from pathlib import Path


def of_float32(model: Path) -> str:
    """What it says of a model in float32, as all tiny ones are."""
    what = "says float32, in which no engine computes"
    do = "convert the model to float16 or bfloat16 to serve it"
    return f"note: {model / 'config.json'}: {what}; {do}"
