"""Hold each pass to its contract, on the same recorded inputs before and after it.

A pass runs on a copy of the program. The program before it runs first and every value is kept; then
the program after it, in which each value that should be what it was is compared with that, and
then takes it: so whatever a pass rewrote is computed from the inputs that it had before, and what
differs was done there (isolated). What is compared is read off the graphs (ir/provenance.py): what
took another node's place, what a region of changed nodes gives, and all that was kept.

    bit_exact   equal bit for bit in the dtypes of the program; NaN equals NaN
    real_exact  equal without rounding (ir/twins.py): within 1e-9 of the largest value, codes equal
    quantizing  without rounding, within the bound of the pass's module, element by element; codes
                in the dtypes of the program too
    layout      bit_exact, after a reshape

Why 1e-9: a sum of n <= 2**17 terms in float64 is off by n * 2**-53 < 2e-11 of the sum of their
sizes, which leaves a factor of 60 to terms that cancel and to what a region does one after another.
For every contract: no value that was finite may cease to be.

What rounding does in the program's own dtypes is shown and not judged: it has no bound here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.nz import from_nz, is_nz_type, to_nz
from kvc8.ir.program import Program, type_of
from kvc8.ir.provenance import Provenance, layer_of, provenance
from kvc8.ir.run import Value
from kvc8.ir.types import TensorType, size
from kvc8.passes.rewrite import Pass, Step, name_of, pass_of
from kvc8.tools.recording import Feed, Hook, Parameters, Recording, State, empty, record

EXACT = 1e-9  # see the module


@dataclass(frozen=True)
class Site:
    """One value that was compared: the largest difference beyond its bound, or else the largest."""

    phase: str
    layer: str
    node: str
    old: str
    figure: float
    bound: float
    call: int  # the number of its call
    rounding: float  # how far it is from what it was in the program's own dtypes; not judged

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.figure <= self.bound


@dataclass
class Verdict:
    """What the check of one pass found. `refused` is why verify refused what it gave."""

    name: str
    contract: str
    sites: list[Site] = field(default_factory=list)
    kept: int = 0  # values that no pass touched, found equal to the last bit
    refused: str = ""
    node: str = ""  # that verify refused
    logits: float = 0.0  # how far the logits move when nothing is isolated; not judged

    @property
    def breaches(self) -> list[Site]:
        """Sites beyond their bound, the first offender first."""
        return [site for site in self.sites if not site.holds]

    @property
    def worst(self) -> Site | None:
        """The first breach, or the site that comes nearest to its bound."""
        ranked = sorted(self.sites, key=lambda s: -(s.figure / s.bound if s.bound else s.figure))
        return next(iter([*self.breaches, *ranked]), None)

    @property
    def sentence(self) -> str:
        """What is wrong, or nothing."""
        if self.refused:
            return f"{self.name}: {self.refused}"
        if not self.breaches:
            return ""
        site = self.breaches[0]
        what = f"{site.node} differs from {site.old} by {site.figure:.3g}, bound {site.bound:.3g}"
        told = f"{self.name}: breaks its contract {self.contract} in {site.layer}, {site.phase}"
        return f"{told}: {what}; see its repro by kvc8-verify --bisect"


@dataclass(frozen=True)
class Call:
    """One call of a program; without a state it continues with the caches of the call before."""

    feed: Feed
    state: State | None = None


@dataclass
class Checked:
    """One pass that was run: the programs, what they gave, and the verdict."""

    before: Program
    after: Program
    olds: list[Recording]
    found: Provenance
    verdict: Verdict
    first: bool = False  # whether it is the first pass that was checked
    news: list[Recording] = field(default_factory=list)  # the program after it, not isolated
    comparisons: list["Comparison"] = field(default_factory=list)  # one a call


def check(
    program: Program,
    steps: Sequence[Step],
    calls: Sequence[Call],
    parameters: Parameters,
    see: Callable[[Checked], None] = lambda checked: None,
) -> list[Verdict]:
    """Run passes over a program and hold each to its contract; stops where verify refuses one.

    `see` is shown each pass that ran, with everything that was recorded.
    """
    verdicts = []
    olds = _run(program, calls, parameters)
    for step in steps:
        before = program.copy()
        olds = [_moved(old, program, before) for old in olds]
        verdict = Verdict(name_of(step), pass_of(step).contract)
        verdicts.append(verdict)
        try:
            remarks = step(program)
        except IRError as error:
            _refuse(verdict, program, str(error))
            see(Checked(before, program, olds, Provenance(), verdict))
            return verdicts
        hits = [remark.node for remark in remarks if not remark.why_not]
        found = provenance(before, program, hits)
        checked = Checked(before, program, olds, found, verdict, first=len(verdicts) == 1)
        _isolated(checked, pass_of(step), calls, parameters)
        checked.news = olds = _run(program, calls, parameters)
        verdict.logits = max(map(_logits_gap, checked.olds, olds))
        see(checked)
    return verdicts


def _refuse(verdict: Verdict, program: Program, error: str) -> None:
    """Note what verify says, after the layer of the node that it names first."""
    named = [node for node in program.graph.nodes if error.startswith(f"{node.name}: ")]
    verdict.node = named[0].name if named else ""
    verdict.refused = f"{layer_of(named[0])}: {error}" if named else error


def _run(program: Program, calls: Sequence[Call], parameters: Parameters) -> list[Recording]:
    made, state = list[Recording](), empty(program)
    for call in calls:
        state = {**state, **_same_types(call.state or {}, state)}
        made.append(record(program, parameters, call.feed.inputs(program), state))
        state = made[-1].caches
    return made


def _same_types(given: State, wanted: State) -> State:
    """Of caches given, those of the dtype that is wanted, in the format that is wanted."""
    return {
        name: (a, b) if a.shape == wanted[name][0].shape else (to_nz(a), to_nz(b))
        for name, (a, b) in given.items()
        if name in wanted and wanted[name][0].dtype is a.dtype
    }


def _moved(old: Recording, program: Program, copy: Program) -> Recording:
    """A recording of a program as one of its copy."""
    to = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
    values = {to[node]: value for node, value in old.values.items()}
    return Recording(old.twins, values, old.caches, [to[node] for node in old.results])


def _logits_gap(old: Recording, new: Recording) -> float:
    a, b = old.values[old.results[0]], new.values[new.results[0]]
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return float((a.double() - b.double()).abs().max())


def _isolated(checked: Checked, pass_: Pass, calls: Sequence[Call], parameters: Parameters) -> None:
    """Run the program after a pass on the values of the program before it."""
    state = empty(checked.after)
    for i, call in enumerate(calls):
        before = checked.olds[i - 1].caches if i and call.state is None else call.state or {}
        state = {**state, **_same_types(before, state)}
        comparison = Comparison(checked, pass_, call.feed, checked.olds[i])
        checked.comparisons.append(comparison)
        inputs = call.feed.inputs(checked.after)
        new = record(checked.after, parameters, inputs, state, comparison.start)
        comparison.finish()
        state = new.caches


class Comparison:
    """Compares one call after a pass with the same call before it, node by node."""

    def __init__(self, checked: Checked, pass_: Pass, feed: Feed, old: Recording) -> None:
        self.checked, self.pass_, self.feed, self.old = checked, pass_, feed, old
        found = checked.found
        self.stands_for: dict[Node, list[Node]] = {}
        self.made: dict[Node, Value] = {}  # what was compared, before the old value took its place
        for new, was in found.took:
            self.stands_for.setdefault(new, []).append(was)
        hidden = found.inside.difference(found.exits)
        for new, was in found.kept.items():
            if new not in hidden and new.op == "call_function":
                self.stands_for.setdefault(new, []).insert(0, was)

    def start(self, new: Recording) -> Hook:
        """The hook of a run after the pass."""
        self.new = new
        return self.see

    def see(self, node: Node, value: Value) -> Value:
        """Compare a value with what it stands for, which takes its place where the types agree."""
        if node in self.stands_for:
            self.made[node] = value
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
        for node, was in self.checked.found.took:
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
            self.checked.verdict.kept += 1
            return
        a, b = (self._whole(n, v) for n, v in ((was, old), (node, value)))
        rounding = _gap(a, b.reshape(a.shape)).amax() if a.numel() else torch.zeros(())
        figure, bound = self._figure(node, was, a, b)
        place = (self.feed.phase, layer_of(node), node.name, was.name)
        call = self.checked.comparisons.index(self)
        self.checked.verdict.sites.append(Site(*place, figure, bound, call, float(rounding)))

    def _is_equal(self, value: Tensor, old: Tensor) -> bool:
        twins = self.new.twins.twin(value), self.old.twins.twin(old)
        return torch.equal(value, old) and torch.equal(*twins)

    def _figure(self, node: Node, was: Node, old: Tensor, new: Tensor) -> tuple[float, float]:
        exact = self._exact(was, self.old), self._exact(node, self.new)
        bound = self._bound(node, was, exact[0])
        return judge(self.pass_.contract, old, new, *exact, bound)

    def bound_of(self, node: Node, was: Node) -> Tensor:
        """By how much each element that counts may differ, or one number for all."""
        return self._bound(node, was, self._exact(was, self.old))

    def _bound(self, node: Node, was: Node, old: Tensor) -> Tensor:
        slack = torch.zeros((), dtype=torch.float64)
        if old.is_floating_point():
            slack = EXACT * old.abs().masked_fill(~old.isfinite(), 0).max()
        if self.pass_.bound is None or self._is_only_kept(node, was):
            return slack
        made = self._whole(was, self.pass_.bound(was, node, self._look))
        return made.expand(old.shape) * (1 + EXACT) + slack

    def _is_only_kept(self, node: Node, was: Node) -> bool:
        found = self.checked.found
        return found.kept.get(node) is was and node not in found.exits

    def _look(self, node: Node) -> Tensor:
        found = (self.new if node in self.new.values else self.old).twin(node)
        assert isinstance(found, Tensor)
        return found

    def _exact(self, node: Node, recording: Recording) -> Tensor:
        found = recording.twin(node)
        assert isinstance(found, Tensor)
        return self._whole(node, found)

    def _whole(self, node: Node, value: Tensor) -> Tensor:
        """What of a value counts: of pages, the slots that were written."""
        type_ = type_of(node)
        if isinstance(type_, TensorType) and type_.shape[:2] == (size("N"), size("S")):
            return value.flatten(0, 1)[self.feed.written] if value.dim() > 1 else value
        if isinstance(type_, TensorType) and is_nz_type(type_):
            return from_nz(value, 1).flatten(0, 1)[self.feed.written]
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
