"""From answers to findings: what does not hold, named by its assumption or row, and each once.

An op that is missing, lost (a hang, a crash) or of which an assumption does not hold explains the
vectors, calls and nodes of that op that differ, and in a model that calls it the nodes of ATen, for
they may read what it wrote, and attention where it writes caches (what attention itself does wrong
its assumptions and vectors tell); only what nothing explains is a finding by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvc8.backends.npu.legality import Limit
from kvc8.tools.device_checker.assumptions import NUMBERED
from kvc8.tools.device_checker.bounds import ATTENTION
from kvc8.tools.device_checker.comparison import BY_MORE, EQUAL
from kvc8.tools.device_checker.runner import CRASHED, HUNG, SKIPPED, Answer
from kvc8.tools.device_checker.tried_limits import TriedCall
from kvc8.tools.device_checker.work import NOT_TRIED, REFUSED

YES, NO, UNKNOWN = "yes", "no", "unknown"
MISSING, OTHER_SCHEMA, ASSUMPTION = "missing op", "another schema", "assumption"
STRICT, LAX, DIFFERS, LOST = "row too strict", "row too lax", "differs", "lost"
CACHE_WRITERS = {
    *("npu_scatter_pa_kv_cache", "npu_scatter_nd_update_", "npu_quant_scatter_"),
    *("npu_rope_quant_kvcache", "npu_dequant_rope_quant_kvcache", "npu_qkv_rms_norm_rope_cache"),
    *("npu_scatter_pa_kv_cache_functional", "_npu_reshape_and_cache"),
}
Rows = Mapping[str, Sequence[Limit]]


@dataclass(frozen=True)
class DeviceFinding:
    """Something that is not as kvc8 assumes it."""

    kind: str
    op: str
    name: str  # of the assumption (A7), of the row (npu_quantize 3), or of what was run
    what: str
    change: Mapping[str, Any] = field(default_factory=dict)  # of the row, for --apply


@dataclass(frozen=True)
class Statement:
    """An assumption and what the device says of it."""

    number: int
    verdict: str
    figure: str


def statements(answers: Sequence[Answer]) -> list[Statement]:
    """Each assumption with yes, no or unknown."""
    found = []
    for answer in answers:
        if answer.probe.section == "assumptions":
            told = answer.told
            known = {True: YES, False: NO}.get(told.get("holds", ""), UNKNOWN)
            figure = told.get("figure") or _words(answer)
            found.append(Statement(answer.probe.given, known, figure))
    return found


def _words(answer: Answer) -> str:
    told = answer.told
    return " ".join(filter(None, (answer.outcome, told.get("code", ""), told.get("said", ""))))


def findings(
    answers: Sequence[Answer], tried: Mapping[str, TriedCall], rows: Rows
) -> list[DeviceFinding]:
    """All findings, those that explain others first."""
    causes = [*_ops(answers), *_lost(answers), *_assumptions(answers)]
    causes += _rows(answers, tried, rows, {each.op for each in causes})
    blamed = {each.op for each in causes}
    return causes + [each for each in _different(answers, blamed) if each.op not in blamed]


def _ops(answers: Sequence[Answer]) -> Iterator[DeviceFinding]:
    told = next((a.told for a in answers if a.probe.work == "ops"), {})
    for name in told.get("missing", ()):
        op = name.partition("::")[2]
        yield DeviceFinding(MISSING, op, op, "torch_npu has no kernel for it")
    for name, schema in told.get("other", {}).items():
        op = name.partition("::")[2]
        yield DeviceFinding(OTHER_SCHEMA, op, op, schema)


def _lost(answers: Sequence[Answer]) -> Iterator[DeviceFinding]:
    for answer in answers:
        if answer.outcome in (HUNG, CRASHED):
            op = answer.probe.ops[0] if len(answer.probe.ops) == 1 else ""
            yield DeviceFinding(LOST, op, answer.probe.name, _words(answer))


def _assumptions(answers: Sequence[Answer]) -> Iterator[DeviceFinding]:
    missing = {each.op for each in _ops(answers)}
    for each in statements(answers):
        said = NUMBERED[each.number]
        if each.verdict == NO and said.op not in missing:
            what = f"{said.op} {said.says}: no, {each.figure}"
            yield DeviceFinding(ASSUMPTION, said.op, f"A{each.number}", what)


def _rows(
    answers: Sequence[Answer], tried: Mapping[str, TriedCall], rows: Rows, blamed: set[str]
) -> Iterator[DeviceFinding]:
    """A row is too strict where what it forbids is taken, and too lax where a legal call is not."""
    seen: set[tuple[str, int, str]] = set()
    for answer in answers:
        each = tried.get(answer.probe.name)
        if each is None or each.call.op in blamed:
            continue
        if not each.legal and answer.outcome not in (REFUSED, SKIPPED, NOT_TRIED, HUNG, CRASHED):
            kind, places = STRICT, each.broken
        elif each.legal and answer.outcome == REFUSED:
            kind, places = LAX, _most_likely(each, rows[each.call.op])
        else:
            continue
        for place in places:
            row = rows[each.call.op][place]
            value = each.facts.get(row.fact)
            if (each.call.op, place, repr(value)) not in seen:
                seen.add((each.call.op, place, repr(value)))
                what = f"{row.fact} {value}: {'taken' if kind == STRICT else _words(answer)}"
                name = f"{each.call.op} row {place + 1}"
                change = {"row": place, "fact": row.fact, "value": value}
                yield DeviceFinding(kind, each.call.op, name, what, change)
        if not places:
            yield DeviceFinding(LAX, each.call.op, answer.probe.name, _words(answer))


def _most_likely(each: TriedCall, rows: Sequence[Limit]) -> tuple[int, ...]:
    """Of the rows that a refused call is about: a list before an end, an end before a relation."""
    by = [
        [i for i in each.about if rows[i].one_of is not None and rows[i].fact in each.facts],
        [i for i in each.about if each.facts.get(rows[i].fact) in (rows[i].max, rows[i].min)],
        list(each.about),
    ]
    return next((tuple(found[:1]) for found in by if found), ())


def _different(answers: Sequence[Answer], blamed: set[str]) -> Iterator[DeviceFinding]:
    """Vectors that are missed, legal calls that are far off or refused, and nodes of the model."""
    for answer in answers:
        if answer.probe.work == "model":
            yield from _different_nodes(answer, blamed)
        elif ODD.get(answer.probe.work, _never)(answer):
            op = answer.probe.ops[0] if answer.probe.ops else ""
            what = answer.told.get("figure") or _words(answer)
            yield DeviceFinding(DIFFERS, op, answer.probe.name, what)


def _different_nodes(answer: Answer, blamed: set[str]) -> Iterator[DeviceFinding]:
    name, called = answer.probe.name, set(answer.probe.ops)
    if answer.outcome == REFUSED:
        yield DeviceFinding(DIFFERS, "", name, _words(answer))
    explained = set(ATTENTION) if called & blamed & CACHE_WRITERS else set()
    for phase, node, op, differ, values, most in answer.told.get("differ", ()):
        if op in explained or (op not in called and called & blamed):
            continue
        what = f"{phase}, {node}: {differ} of {values} values, {most} at most"
        yield DeviceFinding(DIFFERS, op, f"{name}: {op}", what)


def _never(_: Answer) -> bool:
    return False


def _missed(answer: Answer) -> bool:
    """Whether a vector's call was refused that the table has taken, or gave something else."""
    legal = bool(answer.probe.given[2])
    return (answer.outcome == REFUSED and legal) or not answer.told.get("passed", True)


ODD: Mapping[str, Callable[[Answer], bool]] = {
    "vector": _missed,
    "call": lambda answer: answer.outcome == BY_MORE,
    "timed": lambda answer: answer.outcome == REFUSED,
    "sum": lambda answer: answer.outcome != EQUAL,
}


def as_json(found: Sequence[DeviceFinding]) -> list[dict[str, Any]]:
    """Findings for report.json."""
    return [{**asdict(each), "change": dict(each.change)} for each in found]
