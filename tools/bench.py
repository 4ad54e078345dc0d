"""Measure what kvc8 makes against what else there is, side by side in one run.

    python -m kvc8.tools.bench decode C8_DIR FLOAT_DIR
    python -m kvc8.tools.bench compile C8_DIR ...
    python -m kvc8.tools.bench quantize FLOAT_DIR --calib-file TEXTS
    python -m kvc8.tools.bench serve ARTIFACT
    python -m kvc8.tools.bench floor FLOAT_DIR --text TEXT [--w8a8 DIR]

Candidates take turns, so that whatever else the machine does meets all of them alike; a figure is
the median over all turns, a ratio the median of the turns' own ratios. Threads are always explicit.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median

from kvc8.tools.benchmarks import compiling as bench_compile
from kvc8.tools.benchmarks import decode as bench_decode
from kvc8.tools.benchmarks import floor as bench_floor
from kvc8.tools.benchmarks import floor_linears
from kvc8.tools.benchmarks import quantize as bench_quantize
from kvc8.tools.benchmarks import serving as bench_serving
from kvc8.tools.benchmarks.rows import STAGES_HEAD, Row, Timing
from kvc8.tools.command import entry

Clock = Callable[[], float]


def interleave(
    candidates: Mapping[str, Callable[[], object]], turns: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds that each candidate took in each turn, after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, call in candidates.items():
            start = clock()
            call()
            if turn:
                taken[name].append(clock() - start)
    return taken


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as long the other takes: the median over turns that were taken together."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def parser() -> argparse.ArgumentParser:
    """The arguments of every benchmark."""
    found = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    each = found.add_subparsers(dest="what", required=True)
    decode = each.add_parser("decode", help=bench_decode.__doc__)
    bench_decode.arguments(decode)
    compiling = each.add_parser("compile", help=bench_compile.__doc__)
    bench_compile.arguments(compiling)
    quantize = each.add_parser("quantize", help=bench_quantize.__doc__)
    bench_quantize.arguments(quantize)
    serve = each.add_parser("serve", help=bench_serving.__doc__)
    bench_serving.arguments(serve)
    floor = each.add_parser("floor", help=bench_floor.__doc__)
    bench_floor.arguments(floor)
    for sub in (decode, compiling, quantize, serve, floor):
        sub.add_argument("--threads", type=int, default=2, help="of each candidate; default: 2")
        sub.add_argument("--turns", type=int, default=15, help="default: 15")
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return found


def work(args: argparse.Namespace) -> int:
    """Run one benchmark and print it."""
    found = rows(args)
    if args.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
        return 0
    if args.what == "compile":
        print(STAGES_HEAD)
    print(*found, sep="\n")
    return 0


def rows(args: argparse.Namespace) -> Sequence[Row]:
    """What a benchmark finds."""
    if args.what == "compile":
        return bench_compile.rows(args)
    if args.what == "quantize":
        return bench_quantize.rows(args)
    if args.what == "floor":
        return bench_floor.rows(args) if args.w8a8 is None else floor_linears.rows(args)
    if args.what == "serve":
        serving = bench_serving.Serving(args)
        return [*_timed(serving.cases(), args), *serving.steps()]
    return _timed(bench_decode.cases(args), args)


def _timed(
    cases: Iterable[tuple[str, Mapping[str, Callable[[], object]]]], args: argparse.Namespace
) -> list[Timing]:
    """A row for each candidate of each case, with the ratio to the case's first."""
    found = list[Timing]()
    for title, candidates in cases:
        taken = interleave(candidates, args.turns)
        ours = next(iter(taken.values()))
        for name, seconds in taken.items():
            milliseconds, times = round(median(seconds) * 1e3, 2), round(ratio(ours, seconds), 3)
            found.append(Timing(title, name, milliseconds, times, args.threads, args.turns))
    return found


def main() -> int:
    """Run a benchmark."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
