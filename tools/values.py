"""What each pass does to the values of a program, along its layers.

    isolated     the error that is made here: the value before the pass and after it, its own inputs
                 taken from the program before the pass
    accumulated  the error that has come together: the value in the program after the pass, run
                 from the start, against the program that these passes started from (CAPTURED up to
                 QUANTIZED, and QUANTIZED after that)

Both are relative RMS, sqrt(sum((new - old)^2) / sum(old^2)), in the program's own dtypes. A value
that is rounded once to a dtype of unit roundoff u is off by at most u of itself, so more than u of
relative RMS was not made by that rounding: such a value is an offender where the isolated error
exceeds u, and a victim where only the accumulated one does. An int8 code is an offender where any
isolated code differs.

Which values stand for each other is read off the graphs, pass by pass (ir/provenance.py), and never
off names.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.program import Program, type_of
from kvc8.ir.provenance import layer_of
from kvc8.ir.types import TensorType, size
from kvc8.tools.contracts import Checked, Comparison
from kvc8.tools.recording import Feed, Recording

MOST = 3  # int8 codes that differ by so much or more are counted together


@dataclass(frozen=True)
class Figure:
    """One value after a pass; errors are relative RMS, `snr` is in dB. None: nothing to compare.

    `codes` counts int8 codes by how far they are off in the isolated run: 0, 1, 2, and more.
    """

    step: str
    phase: str
    layer: str
    node: str
    old: str  # what it stands for in the program before the pass
    isolated: float
    accumulated: float | None
    max_abs: float | None  # of the accumulated error
    snr: float | None  # of the accumulated error; None where there is none at all
    saturation: float | None  # share of the codes at -128 or 127
    codes: tuple[int, ...] | None
    offends: bool  # see the module


@dataclass(frozen=True)
class Logits:
    """The last logits of a call after a pass, against the program its section started from."""

    step: str
    phase: str
    max_abs: float
    rms: float
    snr: float | None
    kl: float  # nats
    top1: bool  # whether the likeliest token is the same
    saturation: float | None  # of all int8 codes that calls give


@dataclass
class Chain:
    """Watches passes being checked, and follows each value back to where its section started."""

    figures: list[Figure] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    _origin: dict[str, str] = field(default_factory=dict)  # names now, and names at the start
    _start: list[dict[str, Tensor]] = field(default_factory=list)  # of each call, values by name

    def see(self, checked: Checked) -> None:
        """Look at one pass that ran."""
        if checked.verdict.refused:
            return
        if checked.first:
            self._start = [_tensors(old) for old in checked.olds]
            self._origin = {node.name: node.name for node in checked.before.graph.nodes}
        stands_for = checked.comparisons[0].stands_for
        self._origin = {
            new.name: self._origin[was.name]
            for new, olds in stands_for.items()
            for was in olds[:1]
            if was.name in self._origin
        }
        for call, comparison in enumerate(checked.comparisons):
            self.figures += list(_worst_of_layers(self._figures(checked, call, comparison)))
            self.logits.append(self._logits(checked, call, comparison.feed))

    def _figures(self, checked: Checked, call: int, comparison: Comparison) -> Iterator[Figure]:
        accumulated, start = checked.news[call], self._start[call]
        for new, olds in comparison.stands_for.items():
            made, was = comparison.made.get(new), comparison.old.values[olds[0]]
            whole = accumulated.values[new]
            if not isinstance(made, Tensor) or not isinstance(was, Tensor) or not made.numel():
                continue
            if not isinstance(whole, Tensor) or made.is_floating_point() != was.is_floating_point():
                continue
            base = start.get(self._origin.get(new.name, ""))
            feed = comparison.feed
            a, b, c = (_counted(new, value, feed) for value in (was, made, whole))
            d = _counted(new, base, feed) if base is not None else None
            yield _figure((checked.verdict.name, feed.phase), new, olds[0], (a, b), (d, c))

    def _logits(self, checked: Checked, call: int, feed: Feed) -> Logits:
        new = checked.news[call]
        made = new.values[new.results[0]]
        first = self._start[call].get(self._origin.get(new.results[0].name, ""))
        assert isinstance(made, Tensor)
        base = first if first is not None else made
        a, b = base[-1].double(), made[-1].double()
        kl = float((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum())
        return Logits(
            checked.verdict.name,
            feed.phase,
            largest_error(a, b),
            relative_rms(base, made),
            decibels(relative_rms(base, made)),
            max(kl, 0.0),  # a sum of rounded terms may fall below zero by a rounding
            bool(a.argmax() == b.argmax()),
            _saturated(checked.after, new),
        )


def _tensors(recording: Recording) -> dict[str, Tensor]:
    return {node.name: v for node, v in recording.values.items() if isinstance(v, Tensor)}


def _counted(node: Node, value: Tensor, feed: Feed) -> Tensor:
    """What of a value counts: of pages, the slots that were written."""
    return value.flatten(0, 1)[feed.written] if _is_paged(node) and value.dim() > 1 else value


def _is_paged(node: Node) -> bool:
    type_ = type_of(node)
    return isinstance(type_, TensorType) and type_.shape[:2] == (size("N"), size("S"))


def _figure(
    where: tuple[str, str],
    node: Node,
    was: Node,
    alone: tuple[Tensor, Tensor],
    whole: tuple[Tensor | None, Tensor],
) -> Figure:
    """Of the value before a pass and after it, isolated; and at the start and now, accumulated."""
    before, made = alone
    isolated, codes = relative_rms(before, made), _histogram(before, made)
    base, now = whole
    fits = base is not None and base.numel() == now.numel()
    total, most = None, None
    if base is not None and fits and base.is_floating_point() == now.is_floating_point():
        total = relative_rms(base, now)
        most = largest_error(base, now)
    offends = isolated > _roundoff(made) if codes is None else isolated > 0
    return Figure(
        *(*where, layer_of(node), node.name, was.name, isolated, total, most),
        *(None if total is None else decibels(total), _saturation(now), codes, offends),
    )


def _roundoff(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps / 2 if value.is_floating_point() else 0.0


def relative_rms(old: Tensor, new: Tensor) -> float:
    """sqrt(sum((new - old)^2) / sum(old^2)), over what is finite in `old`: masks are not.

    1 where `old` is zero all over and `new` is not; infinite where `new` has ceased to be finite.
    """
    if torch.equal(old.flatten(), new.flatten()):
        return 0.0
    finite = old.flatten().isfinite()
    a, b = (x.flatten()[finite].double() for x in (old, new))
    error, power = (b - a).square().sum(), a.square().sum()
    if not error.isfinite():
        return math.inf
    return math.sqrt(float(error / power)) if power else float(error > 0)


def largest_error(old: Tensor, new: Tensor) -> float:
    """The largest |new - old|, over what is finite in `old`."""
    finite = old.flatten().isfinite()
    a, b = (x.flatten()[finite].double() for x in (old, new))
    return float((b - a).abs().nan_to_num(math.inf, math.inf).max()) if len(a) else 0.0


def decibels(rms: float) -> float | None:
    """The signal-to-noise ratio of a relative RMS error; None where there is no error."""
    return -20 * math.log10(rms) if 0 < rms < math.inf else None


def _histogram(old: Tensor, new: Tensor) -> tuple[int, ...] | None:
    if old.dtype is not torch.int8 or new.dtype is not torch.int8:
        return None
    gap = (old.flatten().int() - new.flatten().int()).abs().clamp(max=MOST)
    return tuple(torch.bincount(gap, minlength=MOST + 1).tolist())


def _saturation(value: Tensor) -> float | None:
    if value.dtype is not torch.int8 or not value.numel():
        return None
    return float(((value == -128) | (value == 127)).double().mean())


def _saturated(program: Program, recording: Recording) -> float | None:
    """The share of codes at an end of their range, of all that are made of floats in a call."""
    made = [
        value.flatten()
        for node in program.graph.nodes
        if node.op == "call_function"
        and isinstance(value := recording.values[node], Tensor)
        and value.dtype is torch.int8
        and not _is_paged(node)
        and not any(_is_int8(recording.values[source]) for source in node.all_input_nodes)
    ]
    return _saturation(torch.cat(made)) if made else None


def _is_int8(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.int8


def _worst_of_layers(figures: Iterator[Figure]) -> Iterator[Figure]:
    """Of each layer the first offender, the largest isolated error and the largest accumulated."""
    layers: dict[str, list[Figure]] = {}
    for figure in figures:
        layers.setdefault(figure.layer, []).append(figure)
    for found in layers.values():
        offenders = [i for i, figure in enumerate(found) if figure.offends]
        every = range(len(found))
        chosen = {
            *offenders[:1],
            max(every, key=lambda i: found[i].isolated),
            max(every, key=lambda i: found[i].accumulated or 0.0),
        }
        yield from (found[i] for i in sorted(chosen))
