"""Hold what is to be quantized to the model that transformers runs, before it is measured.

A few of the calibration tokens tell. The check holds one layer at a time, as a run does, and what
transformers copies when it loads: nothing where tensors stay where they are stored, all experts
where it puts them together. Where that does not fit it is left out, and it is said why.
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path

from kvc8.ir.capture.original import copied_bytes
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.program import Program
from kvc8.tools.driver.faithful import TOKENS, hold
from kvc8.tools.quantizer.layers import LayerCalls
from kvc8.tools.quantizer.memory import needed, resident


def check_float_model(
    checkpoint: Checkpoint,
    program: Program,
    cut: Sequence[LayerCalls],
    texts: Sequence[Sequence[int]],
    budget: float | None,
    note: Callable[[str], None],
) -> None:
    """Hold a float model's program to transformers' own model on calibration tokens.

    Where that cannot be done `note` hears why. Raises ModelError where it computes something else.
    """
    tokens = list(islice(chain.from_iterable(texts), TOKENS))
    least = copied_bytes(checkpoint) + needed(cut, TOKENS)
    left = min(available(), float("inf") if budget is None else budget - resident())
    if least > left:
        what = f"which takes {least / 1e9:.2f} GB, and {left / 1e9:.2f} GB are left"
        note(_left_out(checkpoint, what))
    elif len(tokens) < 2:
        note(_left_out(checkpoint, "which takes two calibration tokens"))
    elif problem := hold(checkpoint, program, tokens).problem:
        raise problem


def _left_out(checkpoint: Checkpoint, why: str) -> str:
    what = f"is not compared with transformers' own model, {why}"
    return f"note: {place(checkpoint.path)}: {what}"


def available() -> float:
    """The bytes of memory that the machine can give without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")
