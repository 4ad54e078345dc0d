"""Measure what kvc8 makes against what else there is, side by side in one run.

    python -m kvc8.tools.bench decode C8_DIR FLOAT_DIR
    python -m kvc8.tools.bench compile C8_DIR ...
    python -m kvc8.tools.bench quantize FLOAT_DIR --calib-file TEXTS
    python -m kvc8.tools.bench serve ARTIFACT
    python -m kvc8.tools.bench floor FLOAT_DIR --text TEXT

Candidates take turns, so that whatever else the machine does meets all of them alike; a figure is
the median over all turns, a ratio the median of the turns' own ratios. Threads are always explicit.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from kvc8.tools.benchmarks import compiling as bench_compile
from kvc8.tools.benchmarks import decode as bench_decode
from kvc8.tools.benchmarks import floor as bench_floor
from kvc8.tools.benchmarks import quantize as bench_quantize
from kvc8.tools.benchmarks import serving as bench_serving
from kvc8.tools.command import entry

Clock = Callable[[], float]
Rows = list[dict[str, object]]  # what --json prints


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
    rows, table = _measured(args)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        table(rows)
    return 0


def _measured(args: argparse.Namespace) -> tuple[Rows, Callable[[Rows], None]]:
    """The rows of a benchmark, and what prints them as a table."""
    if args.what == "compile":
        return bench_compile.rows(args), _print_stages
    if args.what == "quantize":
        return bench_quantize.rows(args), _print_cost
    if args.what == "floor":
        return bench_floor.rows(args), _print_floor
    if args.what == "serve":
        serving = bench_serving.Serving(args)
        return [*_timed(serving.cases(), args), *serving.steps()], _print
    return _timed(bench_decode.cases(args), args), _print


def _timed(
    cases: Iterable[tuple[str, Mapping[str, Callable[[], object]]]], args: argparse.Namespace
) -> Rows:
    """A row for each candidate of each case, with the ratio to the case's first."""
    rows: Rows = []
    for title, candidates in cases:
        taken = interleave(candidates, args.turns)
        ours = next(iter(taken.values()))
        for name, seconds in taken.items():
            milliseconds = round(median(seconds) * 1e3, 2)
            times = round(ratio(ours, seconds), 3)
            row = {"case": title, "candidate": name, "ms": milliseconds, "ratio": times}
            rows.append(row | {"threads": args.threads, "turns": args.turns})
    return rows


def _print(rows: Rows) -> None:
    for row in rows:
        case, candidate, ms, times = (row[key] for key in ("case", "candidate", "ms", "ratio"))
        print(f"{case!s:>16}  {candidate!s:<26} {ms:>9} ms  {times:>7}x")


def _print_cost(rows: Rows) -> None:
    for row in rows:
        cpu, peak, times = (row[key] for key in ("cpu_s", "peak_mb", "ratio"))
        print(f"{row['candidate']!s:<26} {cpu:>7} s of user CPU  {peak:>6} MB  {times:>7}x")


def _print_stages(rows: Rows) -> None:
    stages = (*bench_compile.STAGES, "all")
    print("user / wall s".ljust(16), *(stage.rjust(14) for stage in stages), "   peak MB")
    for row in rows:
        each = [" / ".join(f"{x:.2f}" for x in row[name]).rjust(14) for name in stages]  # type: ignore[attr-defined]
        print(str(row["model"]).ljust(16), *each, f"{row['peak_mb']:>10}")


def _print_floor(rows: Rows) -> None:
    for row in rows:
        name, sides, change, kl, p99, top1 = row.values()
        what = f"{name!s:<16} {sides!s:>3}  perplexity {change:+.3%}"
        print(f"{what}  KL {kl:.5f}, 99 % {p99:.4f}  same top token {top1:.2%}")


def main() -> int:
    """Run a benchmark."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
