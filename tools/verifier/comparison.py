"""Compare one call after a pass with the same call before it: see tools/verifier/contracts.py."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.nz import from_nz, is_nz_type
from kvc8.ir.program import type_of
from kvc8.ir.provenance import Provenance, layer_of
from kvc8.ir.run import Value
from kvc8.ir.types import TensorType, size
from kvc8.passes.rewrite import Contract, Pass
from kvc8.tools.verifier.gaps import measure
from kvc8.tools.verifier.recording import Feed, Hook, Recording
from kvc8.tools.verifier.verdicts import ComparedValue, Verdict

NEW = torch.ops.aten.new_empty.default  # holds nothing until an op writes to it
EXACT = 1e-9  # of the largest value; see tools/verifier/contracts.py


class Comparison:
    """Compares one call after a pass with the same call before it, node by node."""

    def __init__(
        self,
        found: Provenance,
        verdict: Verdict,
        pass_: Pass,
        feed: Feed,
        old: Recording,
        call: int,
    ) -> None:
        self.found, self.verdict, self.pass_ = found, verdict, pass_
        self.feed, self.old, self.call = feed, old, call
        self.contracts: Mapping[Node, Contract] = {}  # of sites that have another than the pass
        self.stands_for: dict[Node, list[Node]] = {}
        for new, was in found.took:
            self.stands_for.setdefault(new, []).append(was)
        hidden = found.inside.difference(found.exits)
        for new, was in found.kept.items():
            if new not in hidden and new.op == "call_function" and new.target is not NEW:
                self.stands_for.setdefault(new, []).insert(0, was)

    def start(self, new: Recording) -> Hook:
        """The hook of a run after the pass."""
        self.new = new
        return self.see

    def see(self, node: Node, value: Value) -> Value:
        """Compare a value with what it stands for, which takes its place where the types agree."""
        for was in self.stands_for.get(node, ()):
            self.compare(node, was)
        for was in self.stands_for.get(node, ()):
            if isinstance(value, Tensor) and type_of(node) == type_of(was):
                found = self.old.values[was]
                assert isinstance(found, Tensor)
                self.new.twins.pair(found, self.old.twins.twin(found))
                return found
        return value

    def finish(self) -> None:
        """Compare the caches that are written in place, which are whole only at the end."""
        for node, was in self.found.took:
            if node.op == "placeholder":
                self.compare(node, was)

    def compare(self, node: Node, was: Node) -> None:
        """Note how far a value is from what it stands for."""
        value, old = self.new.values[node], self.old.values[was]
        if not isinstance(value, Tensor) or not isinstance(old, Tensor):
            return
        if value.dtype.is_floating_point != old.dtype.is_floating_point:
            return
        if value is old or (self._is_only_kept(node, was) and self._is_equal(value, old)):
            self.verdict.kept += 1
            return
        a, b = (whole(self.feed, n, v) for n, v in ((was, old), (node, value)))
        if not a.numel():
            return
        figure, bound = self._figure(node, was, a, b)
        place = (self.feed.phase, layer_of(node), node.name, was.name)
        self.verdict.sites.append(ComparedValue(*place, figure, bound, self.call, measure(a, b)))

    def _is_equal(self, value: Tensor, old: Tensor) -> bool:
        twins = self.new.twins.twin(value), self.old.twins.twin(old)
        return torch.equal(value, old) and torch.equal(*twins)

    def _figure(self, node: Node, was: Node, old: Tensor, new: Tensor) -> tuple[float, float]:
        exact = self._exact(was, self.old), self._exact(node, self.new)
        bound = self._bound(node, was, exact[0])
        contract = self.contracts.get(node, self.pass_.contract)
        return judge(contract, old, new, *exact, bound)

    def bound_of(self, node: Node, was: Node) -> Tensor:
        """By how much each element that counts may differ, or one number for all."""
        return self._bound(node, was, self._exact(was, self.old))

    def _bound(self, node: Node, was: Node, old: Tensor) -> Tensor:
        slack = torch.zeros((), dtype=torch.float64)
        if old.is_floating_point():
            slack = EXACT * old.abs().masked_fill(~old.isfinite(), 0).max()
        if self.pass_.bound is None or self._is_only_kept(node, was):
            return slack
        made = whole(self.feed, was, self.pass_.bound(was, node, self._look))
        return made.expand(old.shape) * (1 + EXACT) + slack

    def _is_only_kept(self, node: Node, was: Node) -> bool:
        found = self.found
        return found.kept.get(node) is was and node not in found.exits

    def _look(self, node: Node) -> Tensor:
        found = (self.new if node in self.new.values else self.old).twin(node)
        assert isinstance(found, Tensor)
        return found

    def _exact(self, node: Node, recording: Recording) -> Tensor:
        found = recording.twin(node)
        assert isinstance(found, Tensor)
        return whole(self.feed, node, found)


def whole(feed: Feed, node: Node, value: Tensor) -> Tensor:
    """What of a node's value counts: of pages, the slots that were written."""
    type_ = type_of(node)
    if isinstance(type_, TensorType) and type_.shape[:2] == (size("N"), size("S")):
        return value.flatten(0, 1)[feed.written] if value.dim() > 1 else value
    if isinstance(type_, TensorType) and is_nz_type(type_):
        return from_nz(value, 1).flatten(0, 1)[feed.written]
    return value


def judge(
    contract: str, old: Tensor, new: Tensor, exact_old: Tensor, exact_new: Tensor, bound: Tensor
) -> tuple[float, float]:
    """How far a value is from what it stands for, and how far it may be; see the module."""
    new, exact_new = new.reshape(old.shape), exact_new.reshape(old.shape)
    if not old.numel():
        return 0.0, 0.0
    if bool((old.isfinite() & ~new.isfinite()).any()):
        return float("inf"), 0.0
    if contract in ("bit_exact", "layout"):
        return _worst(_gap(old, new), torch.zeros(()))
    figures = [_worst(_gap(exact_old, exact_new), bound)]
    if contract == "quantizing" and not old.dtype.is_floating_point:
        figures.append(_worst(_gap(old, new), bound))
    return max(figures, key=lambda figure: figure[0] - figure[1])


def _gap(old: Tensor, new: Tensor) -> Tensor:
    """The absolute difference in float64; equal values, NaN and infinities too, differ by 0."""
    same = (old == new) | (old.isnan() & new.isnan())
    gap = (old.double() - new.double()).abs()
    return gap.masked_fill(same, 0).nan_to_num(float("inf"), float("inf"))


def _worst(gap: Tensor, bound: Tensor) -> tuple[float, float]:
    """The difference that exceeds its bound by most, or comes nearest to it, and that bound."""
    wide = bound.to(torch.float64).expand(gap.shape)
    at = int((gap - wide).argmax())
    return float(gap.flatten()[at]), float(wide.reshape(-1)[at])
