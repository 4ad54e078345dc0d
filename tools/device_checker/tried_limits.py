"""Calls at the limits of legality.json and one beyond: which rows are too strict, which too lax.

A call that breaks no row should be taken; one that breaks a single row should be refused. Calls
come from three places: tests/golden/npu_legality, which a clone has, `limits.json` beside this
file, with numbers at their ends and what the sources contradict each other on, and each row that
lists dtypes, words or numbers, of which every one is tried, and one that is not listed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvc8.backends.npu.facts import Facts
from kvc8.backends.npu.legality import Limit, breaks, limits
from kvc8.ir.errors import IRError, TargetError
from kvc8.tools.device_checker.calls import SpelledCall, facts_of

OTHER_DTYPES = ("f32", "f16", "bf16", "i8", "i32", "i64")


@dataclass(frozen=True)
class TriedCall:
    """A call, and what the table says of it."""

    name: str
    call: SpelledCall
    broken: tuple[int, ...] = ()  # rows of its op, by their place in legality.json
    about: tuple[int, ...] = ()  # rows that it says something of when it is refused
    contradicted: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)  # that those rows speak of

    @property
    def legal(self) -> bool:
        """Whether the table has it taken."""
        return not self.broken


def tried_calls(golden: Path, soc: str) -> list[TriedCall]:
    """All calls; none where the golden calls do not lie."""
    folder = golden / "npu_legality"
    if not (folder / "legal.json").is_file():
        return []
    bases = {
        name: SpelledCall(base["op"], base["arguments"])
        for name, base in json.loads((folder / "legal.json").read_text("utf-8")).items()
    }
    own = json.loads(files("kvc8.tools.device_checker").joinpath("limits.json").read_text("utf-8"))
    changes = [
        *json.loads((folder / "refused.json").read_text("utf-8")),
        *own["at the limit"],
        *({**each, "contradicted": True} for each in own["contradicted"]),
    ]
    rows, found = limits(soc), dict[str, TriedCall]()
    known = {name: facts_of(call) for name, call in bases.items()}
    for name, call in bases.items():
        judge(found, name, known[name], call, rows[call.op])
        for words, changed in variations(call, rows[call.op]):
            judge(found, f"{name}, {words}", known[name], changed, rows[call.op])
    for each in changes:
        base = bases[each["call"]]
        changed = base.changed(each["changes"], each.get("block_size"))
        name = f"{each['call']}, {words_of(each)}"
        of = known[each["call"]]
        judge(found, name, of, changed, rows[base.op], each.get("contradicted", False))
    return list(found.values())


def words_of(each: Mapping[str, Any]) -> str:
    """A change in words."""
    said = [f"{name} {value}" for name, value in each["changes"].items()]
    size = each.get("block_size", 128)
    return ", ".join(said + [f"blocks of {size}"] * (size != 128 or not said))


def judge(
    found: dict[str, TriedCall],
    name: str,
    base: Facts,
    call: SpelledCall,
    rows: tuple[Limit, ...],
    contradicted: bool = False,
) -> None:
    """Add a call, unless it breaks several rows or is none that a program can make."""
    try:
        facts = facts_of(call)
    except (IRError, TargetError):
        return
    broken = [each.row for each in breaks(call.op, rows, facts)]
    if len(broken) > 1 or name in found:
        return
    changed = {key for key, value in facts.items() if base.get(key) != value}
    about = [
        i
        for i, row in enumerate(rows)
        if row.applies(facts) and {row.fact, *row.when, row.same_as, row.multiple_of} & changed
    ]
    places = tuple(rows.index(row) for row in broken)
    said = {rows[i].fact: facts[rows[i].fact] for i in (*about, *places)}
    found[name] = TriedCall(name, call, places, tuple(about), contradicted, said)


def variations(call: SpelledCall, rows: tuple[Limit, ...]) -> Iterator[tuple[str, SpelledCall]]:
    """Calls with one argument that each row allows, and with one that it does not."""
    types = call.types()
    for row in rows:
        name, _, ending = row.fact.partition(" ")
        listed = [*(row.one_of or ())]
        if ending == "dtype" and name in types:
            old = types[name].partition("[")[0]
            beyond = next((d for d in OTHER_DTYPES if d not in (*listed, old)), None)
            for dtype in [*listed, *filter(None, [beyond])]:
                if dtype != old:
                    type_ = str(dtype) + types[name][len(old) :]
                    yield f"{name} {dtype}", call.changed({name: type_})
        elif not ending and listed and name in call.arguments and name not in types:
            for value in [*listed, _unlisted(listed)]:
                if value not in (call.arguments[name], "given", "none"):
                    yield f"{name} {value}", call.changed({name: value})


def _unlisted(listed: list[Any]) -> Any:
    numbers = [x for x in listed if isinstance(x, int)]
    return max(numbers) + 1 if numbers else "none"
