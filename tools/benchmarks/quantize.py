"""kvc8-quantize by each recipe: processor seconds, and the peak of resident memory."""

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType

from kvc8.ir.errors import KVC8Error
from kvc8.tools.benchmarks.measured import CommandRun, measured
from kvc8.tools.benchmarks.rows import CommandCost

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


def rows(args: argparse.Namespace) -> list[CommandCost]:
    """One row a recipe: medians over the turns, which the recipes take one after the other."""
    taken: dict[str, list[CommandRun]] = {name: [] for name in RECIPES}
    for _ in range(args.turns):
        for name, options in RECIPES.items():
            taken[name].append(_quantize(args, options))
    return [_row(name, runs, taken["kvc8"], args) for name, runs in taken.items()]


def _row(
    name: str, runs: Sequence[CommandRun], ours: Sequence[CommandRun], args: argparse.Namespace
) -> CommandCost:
    cpu, peak = round(median(run.user for run in runs), 1), round(median(run.peak for run in runs))
    times = round(median(run.user / own.user for run, own in zip(runs, ours, strict=True)), 3)
    return CommandCost("quantize", name, cpu, peak, times, args.threads, args.turns)


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
