"""Ask a device everything, and put down what it said: the report."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvc8.backends.npu.legality import Limit, breaks, limits
from kvc8.ir.errors import IRError
from kvc8.tools.device_checker import models, vectors
from kvc8.tools.device_checker.assumptions import NUMBERED
from kvc8.tools.device_checker.calls import SpelledCall, facts_of
from kvc8.tools.device_checker.collectives import TimedSum, timed_sums
from kvc8.tools.device_checker.findings import as_json, findings, statements
from kvc8.tools.device_checker.runner import Answer, Opener, Probe, answers
from kvc8.tools.device_checker.timings import TimedCall, timed_calls
from kvc8.tools.device_checker.tried_limits import TriedCall, tried_calls

FORMAT = 1
REPORT = "report.json"
SECTIONS = ("ops", "assumptions", "vectors", "limits", "model", "times", "cards")
Report = dict[str, Any]
Tell = Callable[[int, int, str], None]  # done, of how many, and what is next
SLOW = 600.0  # seconds for a whole model


def check(
    opener: Opener,
    soc: str,
    golden: Path,
    tell: Tell,
    *,
    small: bool = False,
    limit: float | None = None,
    sections: Sequence[str] = SECTIONS,
    only: Callable[[Probe], bool] = lambda _: True,
) -> Report:
    """Run the probes of sections, those that `only` takes; gives the report."""
    calls = tried_calls(golden, soc) if "limits" in sections else []
    tried = {each.name: each for each in calls}
    timed = {each.name: each for each in timed_calls(small=small)}
    found = list(answers(opener, [Probe("ops", "ops", "ops", None)], limit))
    sums = {s.name: s for s in timed_sums(found[0].told.get("cards", 1), small=small)}
    with tempfile.TemporaryDirectory() as folder:
        forms = models.compile_forms(Path(folder), soc) if "model" in sections else {}
        asked = [*_probes(golden, tried, timed, forms, limits(soc)), *_cards(sums)]
        probes = [p for p in asked if p.section in sections and only(p)]
        for answer in answers(opener, probes, limit):
            found.append(answer)
            tell(len(found), len(probes) + 1, answer.probe.name)
    return _report(found, soc, tried, {**timed, **sums})


def _probes(
    golden: Path,
    tried: dict[str, TriedCall],
    timed: dict[str, TimedCall],
    forms: dict[str, Path],
    rows: Mapping[str, tuple[Limit, ...]],
) -> list[Probe]:
    found = []
    for number, each in NUMBERED.items():
        found.append(Probe(f"A{number}", "assumptions", "assumption", number, (each.op,)))
    for name, case in vectors.primary(golden).items():
        op = str(vectors.CALLED_BY.get(case["fn"], case["fn"]))
        given = str(golden), name, _legal(vectors.spelled(case), rows)
        found.append(Probe(name, "vectors", "vector", given, (op,)))
    for name, call in tried.items():
        found.append(Probe(name, "limits", "call", (call.call, call.legal), (call.call.op,)))
    for name, directory in forms.items():
        ops = models.called_ops(directory)
        for way in models.ways(name):
            title = f"{name}, {way}"
            found.append(Probe(title, "model", "model", (str(directory), way), ops, SLOW))
    for name, one in timed.items():
        found.append(Probe(name, "times", "timed", one.call, (one.call.op,)))
    return found


def _cards(sums: Mapping[str, TimedSum]) -> list[Probe]:
    return [
        Probe(n, "cards", "sum", each, seconds=120, cards=each.cards) for n, each in sums.items()
    ]


def _legal(call: SpelledCall | None, rows: Mapping[str, tuple[Limit, ...]]) -> bool:
    """Whether the table has a call taken; some vectors are of arguments that an A2 refuses."""
    try:
        return call is None or not any(breaks(call.op, rows[call.op], facts_of(call)))
    except IRError:
        return False  # no program can make it


def _report(
    found: Sequence[Answer],
    soc: str,
    tried: dict[str, TriedCall],
    timed: Mapping[str, TimedCall | TimedSum],
) -> Report:
    rows = limits(soc)
    first = next((a.told for a in found if a.probe.work == "ops"), {})
    counts: dict[str, Counter[str]] = {}
    for answer in found:
        counts.setdefault(answer.probe.section, Counter())[answer.outcome] += 1
    taken = [tried[a.probe.name] for a in found if a.probe.name in tried]
    return {
        "format": FORMAT,
        "kvc8": version("kvc8"),
        "soc": soc,
        "facts": first.get("facts", {}),
        "cards": first.get("cards", 0),
        "findings": as_json(findings(found, tried, rows)),
        "assumptions": [
            {
                "number": each.number,
                "op": NUMBERED[each.number].op,
                "says": NUMBERED[each.number].says,
                "verdict": each.verdict,
                "figure": each.figure,
            }
            for each in statements(found)
        ],
        "counts": {section: dict(of) for section, of in counts.items()},
        "rows": {
            "all": sum(map(len, rows.values())),
            "at a limit": len({(t.call.op, i) for t in taken if t.legal for i in t.about}),
            "beyond": len({(t.call.op, i) for t in taken for i in t.broken}),
        },
        "times": [_time(a, timed[a.probe.name]) for a in found if a.probe.name in timed],
        "answers": [{"name": a.probe.name, "section": a.probe.section, **a.told} for a in found],
    }


def _time(answer: Answer, each: TimedCall | TimedSum) -> dict[str, Any]:
    """`sent` is what a card must send, where it is of several, and `rate` that in a second."""
    seconds, bound = answer.told.get("seconds"), each.bound
    ratio = seconds / bound if seconds and bound else None
    sent = each.sent if isinstance(each, TimedSum) else None
    rate = sent / seconds if seconds and sent else None
    told = {"seconds": seconds, "bound": bound, "ratio": ratio, "sent": sent, "rate": rate}
    return {"name": each.name, "section": answer.probe.section, **told}


def write(report: Report, out: Path) -> None:
    """Write report.json."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (out / REPORT).write_text(text, encoding="utf-8")
