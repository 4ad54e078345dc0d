"""What kvc8 compiled with its own torch runs with another one: `python check.py OUT`.

1. The QUANTIZED program in float64 gives the same tokens, which rounding does not decide.
2. The artifact's logits, in float16, are as near to those of float64 as with kvc8's own torch. Both
   round as often, each in its own way, so their errors are of one size: 14 rows of 512 logits tell
   their root mean square to a few per cent, and to less well where a code of the cache turns. Twice
   as much is another computation.
3. kvc8-run continues a text with the artifact: transformers reads the tokenizer.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
import transformers
from steps import NAMES, NEW, artifact, exact, logits
from torch import Tensor

from kvc8.ir.text import parse
from kvc8.tools import run

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "checkpoints"


def error(found: Tensor, wanted: Tensor) -> float:
    """The root mean square of the difference."""
    return float((found - wanted).square().mean().sqrt())


def check(folder: Path, name: str) -> str:
    """Check one model; gives what was seen. Raises AssertionError where something differs."""
    known = torch.load(folder / "found.pt")[name]
    program = parse((folder / f"{name}.py").read_text())
    tokens, _ = logits(exact(program, GOLDEN / name / "quant"))
    assert tokens == known["tokens"], f"in float64: {tokens}, not {known['tokens']}"
    _, found = logits(artifact(folder / name), tokens)
    off, own = error(found, known["exact"]), error(known["artifact"], known["exact"])
    assert off < 2 * own, f"logits of the artifact are off by {off:.2g}, kvc8's own torch {own:.2g}"
    same = int((found.argmax(-1) == known["artifact"].argmax(-1)).sum())
    return f"{NEW} tokens in float64, logits of the artifact {off / own:.3f} as far off, " + (
        f"{same} of {len(found)} likeliest tokens the same"
    )


def says(folder: Path, name: str) -> None:
    """Let kvc8-run continue a text."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        given = ["--prompt", "hello", "--max-new-tokens", "8", "--json"]
        assert run.main([str(folder / name), *given]) == 0
    [sequence] = json.loads(printed.getvalue())["sequences"]
    assert len(sequence["tokens"]) == 8


def main(out: str) -> None:
    """Check each model."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in NAMES:
        print(f"{name}: {check(Path(out), name)}")
        says(Path(out), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
