"""What a rotation does to each stored tensor: which of its sides it turns, and what it folds."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from kvc8.ir.expression import Expression, stored_names
from kvc8.ir.program import Program, argument, expression_of, is_call, is_parameter

ATEN = torch.ops.aten


class NotTurned(Exception):
    """Why a model, or a layer of it, is not turned: a part of a sentence."""


@dataclass(frozen=True)
class Norm:
    """A norm's stored weight w; the norm multiplies by w + plus."""

    name: str
    plus: float


@dataclass(frozen=True)
class Turn:
    """A side of a tensor that is turned: what a linear reads (-1) or gives (-2), a bias (-1)."""

    axis: int
    head: int | None = None  # the channels of each head; None for the residual stream
    span: tuple[int, int] | None = None  # of the side; all of it if None
    norm: Norm | None = None  # whose weight is folded in first


@dataclass
class Roles:
    """What was found out of the stored tensors, by name."""

    program: Program
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)  # what a folded weight becomes
    untied: dict[str, str] = field(default_factory=dict)  # a head's name, and the table's it shares
    _known: set[tuple[Node, Node]] = field(default_factory=set)  # parameters, and who uses them

    def turn(self, call: Node, at: int, turn: Turn) -> None:
        """A call's parameter is turned so. Raises NotTurned where it is not stored as it is."""
        parameter = argument(call, at)
        if not is_parameter(parameter):
            raise NotTurned(f"{where(call)} has a weight that is not stored")
        self._known.add((parameter, call))
        for name, axis in _tensors(expression_of(parameter), turn.axis, parameter, call):
            found = Turn(axis, turn.head, turn.span, turn.norm)
            self._add(self._own(name, parameter, call), found)

    def norm(self, call: Node, factor: Node) -> Norm:
        """A norm of the stream whose factor is folded. Raises NotTurned if it is no stored one."""
        chain, plus = [call], 0.0
        node = factor
        while is_call(node, ATEN.to.dtype, ATEN.type_as.default, ATEN.add.Tensor):
            plus += sum(float(x) for x in node.args[:2] if isinstance(x, int | float))
            chain.append(node)
            node = argument(node, 0) if isinstance(node.args[0], Node) else argument(node, 1)
        names = list(stored_names(expression_of(node))) if is_parameter(node) else []
        if len(names) != 1 or len(node.meta["type"].shape) != 1:
            raise NotTurned(f"{where(call)} scales the channels of the residual stream")
        self._known |= set(zip([*chain[1:], node], chain, strict=True))
        self.norms[names[0]] = 1.0 - plus
        return Norm(names[0], plus)

    def check(self) -> None:
        """Raises NotTurned where a tensor that is changed has another use too."""
        changed = {*self.turns, *self.norms}
        if both := set(self.turns) & set(self.norms):
            raise NotTurned(f"{min(both)} is both a linear's and a norm's")
        for parameter in self.program.parameters():
            names = set(stored_names(expression_of(parameter))) & changed
            for user in parameter.users if names else ():
                if (parameter, user) not in self._known:
                    raise NotTurned(f"{where(user)} uses {min(names)} too")

    def join(self, other: "Roles") -> None:
        """Take what another found of the same program. Raises NotTurned where that differs."""
        for name, turns in other.turns.items():
            for turn in turns:
                self._add(name, turn)
        self.norms |= other.norms
        self.untied |= other.untied
        self._known |= other._known

    def _own(self, name: str, parameter: Node, call: Node) -> str:
        """The name of a tensor, or of the copy that a tied head gets."""
        tables = [u for u in parameter.users if is_call(u, ATEN.embedding.default)]
        if not tables or call in tables:
            return name
        head = f"{where(call)}.weight"
        self.untied[head] = name
        return head

    def _add(self, name: str, turn: Turn) -> None:
        found = self.turns.setdefault(name, [])
        alike = [t for t in found if (t.axis, t.head) == (turn.axis, turn.head)]
        if any(t != turn for t in alike):
            raise NotTurned(f"{name} is used in two ways")
        if not alike:
            found.append(turn)


def where(node: Node) -> str:
    """The module that a call stands in."""
    return str(node.meta.get("origin") or node.name)


def _tensors(of: Expression, axis: int, parameter: Node, call: Node) -> Iterator[tuple[str, int]]:
    """The stored tensors of a parameter, and which side of each is the parameter's `axis`."""
    if of.op == "stored":
        yield str(of.args[0]), axis
    elif of.op == "stacked":
        yield from ((name, axis) for name in stored_names(of))
    elif of.op in ("cast", "concat") and not _joins(of, axis, parameter):
        for part in of.args[0] if isinstance(of.args[0], tuple) else of.args[:1]:
            assert isinstance(part, Expression)
            yield from _tensors(part, axis, parameter, call)
    else:
        raise NotTurned(f"{where(call)} has a weight that is made by {of.op}")


def _joins(of: Expression, axis: int, parameter: Node) -> bool:
    """Whether tensors are joined along the side that is to be turned."""
    rank = len(parameter.meta["type"].shape)
    return of.op == "concat" and isinstance(of.args[1], int) and of.args[1] == axis % rank
