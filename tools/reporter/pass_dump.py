"""`kvc8-compile --dump DIR`: the program after each pass, and what the pass did.

    00-captured.py              the program as it was captured
    NN-pass.py                  the program after the pass, whole, as text that reads back
    NN-pass.diff                the lines that changed, as a unified diff
    NN-pass.txt                 the pass with its options, as kvc8-opt --passes takes it; sites,
                                reasons, calls by op, bytes, and each remark
    NN-pass.sources.txt         of each node that is new, the nodes before the pass it came from
    int8/ prefill/ chunk/ decode/   likewise what phases share, and each phase

Two compiles of one input write the same bytes, so that dumps can be compared by `diff -r`. Of all
files but the programs, what goes past LIMIT bytes is left out, and a last line says how much it is.
"""

from collections.abc import Iterable, Iterator
from difflib import unified_diff
from pathlib import Path

from kvc8.ir.text import show
from kvc8.passes.pipeline import Ran, See
from kvc8.tools.reporter.pass_facts import ProgramBytes, counts, sizes, sources, summary

LIMIT = 1 << 16  # bytes of a file; two layers of a large model, and those after are like them


def writer(folder: Path) -> See:
    """What writes each pass that ran into a directory, which is made where there is none."""

    def see(ran: Ran) -> None:
        place = folder / ran.path
        place.mkdir(parents=True, exist_ok=True)
        before, after = show(ran.before), show(ran.after)
        if ran.number == 1:
            (place / f"00-{ran.before.stage.value}.py").write_text(before + "\n")
        name = f"{ran.number:02}-{ran.step.name}"
        (place / f"{name}.py").write_text(after + "\n")
        _write(place / f"{name}.diff", _diff(before, after))
        _write(place / f"{name}.txt", _told(ran))
        _write(place / f"{name}.sources.txt", _sources(ran))

    return see


def _write(path: Path, lines: Iterable[str]) -> None:
    every = list(lines)
    kept, room = 0, LIMIT
    for line in every:
        room -= len(line.encode()) + 1
        if room < 0:
            break
        kept += 1
    left = len(every) - kept
    more = [f"... and {left:,} lines more, left out"] if left else []
    path.write_text("".join(f"{line}\n" for line in [*every[:kept], *more]))


def _diff(before: str, after: str) -> Iterator[str]:
    return unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="")


def _told(ran: Ran) -> Iterator[str]:
    yield f"{ran.spelled}: {ran.before.stage.value} to {ran.after.stage.value}"
    yield f"contract: {ran.step.contract}"
    yield from summary(ran)
    yield ""
    was, now = counts(ran.before), counts(ran.after)
    yield _row("calls", "before", "after")
    for op in sorted(was | now):
        yield _row(op, was[op], now[op])
    yield _row("all", was.total(), now.total())
    yield ""
    old, new = sizes(ran.before), sizes(ran.after)
    for kind in ProgramBytes.__annotations__:
        a, b = getattr(old, kind), getattr(new, kind)
        yield f"bytes of {kind}: {b}" if a == b else f"bytes of {kind}: {a} before, {b} after"
    yield ""
    yield from map(str, ran.remarks)


def _row(name: str, before: object, after: object) -> str:
    mark = "" if before == after or name == "calls" else "  *"
    return f"{name:<44}{before!s:>8}{after!s:>8}{mark}"


def _sources(ran: Ran) -> Iterator[str]:
    for node, olds in sources(ran).items():
        yield f"{node} <- {', '.join(olds) or 'nothing'}"
