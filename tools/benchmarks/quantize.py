"""kvc8-quantize by each recipe: processor seconds, and the peak of resident memory."""

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType

from kvc8.ir.errors import KVC8Error
from kvc8.tools.benchmarks.measured import CommandRun, measured

RECIPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kvc8": ("--recipe", "kvc8"),
        "msmodelslim, m3, float32": (
            *("--recipe", "msmodelslim", "--anti-method", "m3", "--act-method", "3"),
            *("--dtype", "float32"),  # as the vendor's script runs on a CPU
        ),
        "minmax": ("--recipe", "minmax"),
    }
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark takes."""
    parser.add_argument("model", type=Path, help="a float model")
    parser.add_argument("--calib-file", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8, help="texts of it; default: 8")


def rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row a recipe: medians over the turns, which the recipes take one after the other."""
    taken: dict[str, list[CommandRun]] = {name: [] for name in RECIPES}
    for _ in range(args.turns):
        for name, options in RECIPES.items():
            taken[name].append(_quantize(args, options))
    ours = taken["kvc8"]
    return [
        {
            "case": "quantize",
            "candidate": name,
            "cpu_s": round(median(m.user for m in each), 1),
            "peak_mb": round(median(m.peak for m in each)),
            "ratio": round(median(m.user / o.user for m, o in zip(each, ours, strict=True)), 3),
            "threads": args.threads,
            "turns": args.turns,
        }
        for name, each in taken.items()
    ]


def _quantize(args: argparse.Namespace, options: tuple[str, ...]) -> CommandRun:
    scratch = Path(tempfile.mkdtemp(prefix="kvc8-bench-"))
    try:
        given = [args.model, "-o", scratch / "out", "--calib-file", args.calib_file]
        given += ["--samples", args.samples, *options]
        done = measured(scratch, "kvc8.tools.quantize", *given, threads=args.threads)
    finally:
        shutil.rmtree(scratch)
    if done.status:
        what = f"kvc8-quantize {' '.join(options)} ends with status {done.status}"
        raise KVC8Error(args.model, what, "run it by itself")
    return done
