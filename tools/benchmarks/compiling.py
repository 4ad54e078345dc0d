"""kvc8-compile for the NPU, stage by stage: processor seconds, wall seconds, the peak of memory.

`python -m kvc8.tools.benchmarks.compiling DIR OUT` is one compile, in a process of its own, which
prints what each stage took. What the interpreter takes to start and end is in the whole alone.
"""

import argparse
import atexit
import gc
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from kvc8.ir.errors import KVC8Error
from kvc8.tools.benchmarks.measured import CommandRun, measured
from kvc8.tools.benchmarks.rows import STAGES, Seconds, Stages


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark takes."""
    parser.add_argument("models", type=Path, nargs="+", metavar="DIR", help="with KV scales")


def rows(args: argparse.Namespace) -> list[Stages]:
    """One row a model: medians over the turns, which the models take one after the other."""
    taken: dict[Path, list[CommandRun]] = {model: [] for model in args.models}
    for _ in range(args.turns):
        for model in taken:
            taken[model].append(_compiled(model, args.threads))
    return [_row(model.name, runs) for model, runs in taken.items()]


def _row(model: str, runs: Sequence[CommandRun]) -> Stages:
    each = [json.loads(run.output) for run in runs]
    stages = {name: _medians([tuple(one[name]) for one in each]) for name in STAGES}
    whole = _medians([(run.user, run.wall) for run in runs])
    return Stages(model, **stages, all=whole, peak_mb=round(median(run.peak for run in runs)))


def _medians(taken: Sequence[Seconds]) -> Seconds:
    user, wall = (round(median(seconds), 2) for seconds in zip(*taken, strict=True))
    return user, wall


def _compiled(model: Path, threads: int) -> CommandRun:
    scratch = Path(tempfile.mkdtemp(prefix=".kvc8-bench-", dir=model.parent))  # weights are linked
    try:
        done = measured(scratch, __name__, model, scratch / "out", threads=threads)
    finally:
        shutil.rmtree(scratch)
    if done.status:
        what = f"compiling it ends with status {done.status}"
        raise KVC8Error(str(model), what, "run kvc8-compile on it")
    return done


def main() -> int:
    """Compile once, as kvc8-compile does with its defaults, and print what each stage took."""
    gc.disable()  # as kvc8-compile does, and as it ends
    atexit.register(gc.freeze)
    warnings.simplefilter("ignore")  # which it says, and no benchmark
    marks = [_now()]
    from kvc8.ir.capture.trace import capture
    from kvc8.passes import pipeline
    from kvc8.tools.driver.compiling import quantize, write
    from kvc8.tools.driver.request import Target, open_known

    marks.append(_now())
    checkpoint, target = open_known(Path(sys.argv[1])), Target("npu")
    marks.append(_now())
    program = capture(checkpoint)
    marks.append(_now())
    quantize(program, read=checkpoint.read)
    phases, _ = pipeline.lower_for_npu(program)
    marks.append(_now())
    write(Path(sys.argv[2]), checkpoint, target, pipeline.DEFAULT, program, phases)
    marks.append(_now())
    spans = zip(STAGES, pairwise(marks), strict=True)
    taken = {name: [b - a for a, b in zip(*span, strict=True)] for name, span in spans}
    print(json.dumps(taken))
    return 0


def _now() -> tuple[float, float]:
    """User and wall seconds."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
