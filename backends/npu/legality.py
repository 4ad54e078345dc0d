"""Whether a device takes the calls of a lowered program, before anything is written.

The limits are data, legality.json: by soc and op a list of rows, each one limit of one fact
(backends/npu/facts.py) with its source:

    {"fact": "head_dim", "when": {"pages": ["i8"]}, "multiple": 32, "max": 512,
     "source": "...", "cure": "compile for onnx instead"}

Where `contradicted_by` names something that is served beyond a limit, both sources are in the
sentence, and whoever compiles may take the other side (`beyond_documents`).

A limit is `one_of` a list, or `min`, `max` and `multiple` of a number, or `same_as` another fact,
or `multiple_of` one. A number that passes keep to as well stands by its name in kvc8.ir.npu. A
limit holds `when` the facts named there are one of those values. `{nearest}` in a cure is the
nearest legal value. All rows are what documents and sources say; no device was asked. The real
torch_npu's own shape functions check much less.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from kvc8.backends.npu.facts import Fact, Facts, facts
from kvc8.backends.socs import rows_of
from kvc8.ir import npu
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, kind_of, op_name


@dataclass(frozen=True)
class Limit:
    """One limit of an op on a soc."""

    fact: str
    source: str
    cure: str
    when: Mapping[str, list[Fact]] = field(default_factory=lambda: MappingProxyType({}))
    one_of: list[Fact] | None = None
    min: int | None = None
    max: int | None = None
    multiple: int | None = None
    same_as: str | None = None
    multiple_of: str | None = None
    contradicted_by: str = ""

    def applies(self, found: Facts) -> bool:
        """Whether the facts are such that the row speaks of them."""
        needed = [self.fact, *filter(None, (self.same_as, self.multiple_of))]
        return all(name in found for name in needed) and all(
            found.get(name) in values for name, values in self.when.items()
        )

    def holds(self, found: Facts) -> bool:
        """Whether a fact keeps to the limit."""
        value = found[self.fact]
        if self.one_of is not None:
            return value in self.one_of
        if self.same_as:
            return value == found[self.same_as]
        if not isinstance(value, int):
            return False  # "several" rows where the limit is a number
        if self.multiple_of:
            return value % int(found[self.multiple_of]) == 0
        low, high = self.min or 1, self.max or value
        return low <= value <= high and value % (self.multiple or 1) == 0

    def limit(self, found: Facts) -> str:
        """What the op takes, in words."""
        if self.one_of is not None:
            return f"{self.fact} {' or '.join(map(str, self.one_of))}"
        if self.same_as:
            return f"{self.fact} equal to {self.same_as} ({found[self.same_as]})"
        if self.multiple_of:
            what = f"{self.multiple_of} ({found[self.multiple_of]})"
            return f"{self.fact} in multiples of {what}"
        step = f"in multiples of {self.multiple}" if self.multiple else ""
        low = f"from {self.min}" if self.min else ""
        high = f"up to {self.max}" if self.max else ""
        return " ".join(filter(None, (self.fact, step, low, high)))

    def nearest(self, found: Facts) -> Fact:
        """The legal value nearest to the one found; of words, the first."""
        value = found[self.fact]
        if self.one_of is not None:
            numbers = [x for x in self.one_of if isinstance(x, int) and isinstance(value, int)]
            return min(numbers, key=lambda x: abs(x - int(value)), default=self.one_of[0])
        if self.same_as:
            return found[self.same_as]
        step = int(found[self.multiple_of]) if self.multiple_of else self.multiple or 1
        asked = value if isinstance(value, int) else 1
        low = -(-(self.min or step) // step) * step
        high = (self.max or max(asked + step, low)) // step * step
        return max(low, min(high, (asked + step // 2) // step * step))


@dataclass(frozen=True)
class Broken:
    """A row that a call breaks."""

    op: str
    row: Limit
    found: Facts

    @property
    def words(self) -> str:
        """What the op takes, and what it got, with the source."""
        what = self.row.limit(self.found)
        when = " and ".join(f"{name} {self.found[name]}" for name in self.row.when)
        what += f" with {when}" * bool(when)
        what = f"{what}, and this is {self.found[self.row.fact]} ({self.row.source})"
        other = self.row.contradicted_by
        return f"{what}, though {other}" if other else what

    def reason(self, soc: str) -> str:
        """The same as a sentence."""
        return f"{self.op} on {soc} takes {self.words}"

    @property
    def cure(self) -> str:
        """What to do about it."""
        return self.row.cure.replace("{nearest}", str(self.row.nearest(self.found)))


def limits(soc: str) -> Mapping[str, tuple[Limit, ...]]:
    """The rows of each op on a soc. Raises TargetError for a soc that has no table."""
    return {op: tuple(Limit(**_numbers(row)) for row in rows) for op, rows in rows_of(soc).items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the number itself where it names one of kvc8.ir.npu."""
    named = row.get("max")
    return {**row, "max": getattr(npu, named)} if isinstance(named, str) else dict(row)


def check(program: Program, soc: str, block_size: int, beyond_documents: bool = False) -> None:
    """Raise TargetError at the first call that breaks a limit, with its source and a cure.

    With `beyond_documents` what another source contradicts is no limit.
    """
    table = limits(soc)
    legal = set[object]()  # a layer's calls are those of the layer before it
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        name = op_name(node.target)
        if name not in table or (kind := kind_of(node)) in legal:
            continue
        for broken in broken_by(table, name, node, block_size):
            if beyond_documents and broken.row.contradicted_by:
                continue
            where = node.meta.get("origin") or node.name
            raise TargetError(where, f"{broken.reason(soc)}", f"{broken.cure}")
        legal.add(kind)


def broken_by(
    table: Mapping[str, tuple[Limit, ...]], op: str, node: Node, block_size: int
) -> Iterator[Broken]:
    """The rows of an op that a call breaks."""
    if rows := table.get(op):
        yield from breaks(op, rows, facts(node, block_size))


def breaks(op: str, rows: tuple[Limit, ...], found: Facts) -> Iterator[Broken]:
    """The rows that facts break."""
    for row in rows:
        if row.applies(found) and not row.holds(found):
            yield Broken(op, row, found)
