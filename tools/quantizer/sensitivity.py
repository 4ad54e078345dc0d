"""What quantizing each linear costs its layer, and which linears to leave float for it.

The linears that read one value are quantized together or not at all, as runtimes pack them: such a
group is what is measured. One sweep over the layers, before the recipe's own: a layer runs in
float, which gives the ranges, and then once more for each of its groups with nothing but that group
quantized, on texts held back from the ranges. The error is how far the layer's output moves:

    mean over tokens of |y' - y|^2 / |y|^2          y, y': a token's residual stream after the layer

Each layer reads the float model's stream, so the errors say what each group does by itself. It is
not the divergence of the model's output: that takes a pass through all later layers for each group,
which one sweep cannot give. Weights are rounded to nearest here; the recipe rounds better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor
from torch.fx import Node

from kvc8.ir.checkpoint.w8a8 import Range, input_params, quantize_linear
from kvc8.ir.run import Value
from kvc8.tools.quantizer.choices import Sample, clipped
from kvc8.tools.quantizer.layers import Evaluate, attend_in_float32, plain, run_stage
from kvc8.tools.quantizer.sites import LinearSite, readers
from kvc8.tools.quantizer.work import Layer, Texts, Work

SAMPLE = 4  # every so many rows of what a linear reads are kept to choose its range by


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read one value, and what quantizing them costs."""

    modules: Sequence[str]
    weights: int  # numbers in them, and so bytes that int8 saves a model of 16 bits
    error: float  # relative, of the layer's output
    rolled_back: bool = False


def measure(work: Work, texts: Texts, chosen: Sequence[LinearSite]) -> list[LinearGroup]:
    """The groups of the linears `chosen`, in the model's order, each with its error."""
    errors: dict[str, float] = {}
    for found in work.sweep(texts, lambda layer: _layer(work, layer, chosen)):
        errors |= {module: float(error) for module, error in found.items()}
    return [
        LinearGroup(
            [s.module for s in group], sum(s.shape[0] * s.shape[1] for s in group), errors[name]
        )
        for group in grouped(chosen)
        for name in [group[0].module]
    ]


def grouped(chosen: Sequence[LinearSite]) -> list[list[LinearSite]]:
    """Sites by the value that they read."""
    made: dict[Node, list[LinearSite]] = {}
    for site in chosen:
        made.setdefault(site.source, []).append(site)
    return list(made.values())


def roll_back(groups: Sequence[LinearGroup], share: float) -> list[LinearGroup]:
    """Mark the groups to leave float: at most this share of the weights, in the order of cost.

    First comes the group with the most error for its size, and one that does not fit is passed
    over, so that a small one may still be taken.
    """
    left = share * sum(group.weights for group in groups)
    taken = set()
    for index in sorted(range(len(groups)), key=lambda i: -groups[i].error / groups[i].weights):
        if groups[index].weights <= left:
            left -= groups[index].weights
            taken.add(index)
    return [
        LinearGroup(g.modules, g.weights, g.error, index in taken) for index, g in enumerate(groups)
    ]


def table(groups: Sequence[LinearGroup]) -> Table:
    """The map: a row a layer, a column for each kind of group; what is left float has a star."""
    rows: dict[str, dict[str, str]] = {}
    for group in groups:
        layer, _, _ = group.modules[0].rpartition(".")[0].rpartition(".")
        kind = " ".join(module.rpartition(".")[2] for module in group.modules)
        error = f"{group.error:.2g}{' *' if group.rolled_back else '  '}"
        rows.setdefault(layer, {})[kind] = error
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    title = "how far quantizing moves a layer's output, |y' - y|^2 / |y|^2"
    made = Table("* left float", title=title, title_justify="left")
    for kind in kinds:
        made.add_column(kind, justify="right")
    for layer, row in rows.items():
        made.add_row(layer, *(row.get(kind, "") for kind in kinds))
    return made


def _layer(work: Work, layer: Layer, chosen: Sequence[LinearSite]) -> Mapping[str, Tensor]:
    """The error of each group of a layer, by its first module."""
    calls = set(layer.stage.calls)
    groups = grouped([site for site in chosen if site.linear in calls])
    seen = _LayerRanges(plain(work.checkpoint, attend_in_float32), readers(chosen))
    held_back = range(len(layer.texts) // 2, len(layer.texts))
    outputs: dict[int, Tensor] = {}
    for index in range(len(layer.texts)):
        seen.ranged = index not in held_back or len(layer.texts) == 1
        layer.run(index, layer.weights, seen.observe)
        if index in held_back:
            outputs[index] = seen.last
    return {g[0].module: torch.tensor(_error(layer, seen, g, outputs)) for g in groups}


@dataclass
class _LayerRanges:
    """The ranges of what a layer's linears read, and what its last call gave."""

    plain: Evaluate
    read: Mapping[Node, Node]  # by linear, what it reads
    ranged: bool = True  # whether ranges see the text at work
    ranges: dict[Node, Range] = field(default_factory=dict)
    samples: dict[Node, Sample] = field(default_factory=dict)
    last: Tensor = field(default_factory=lambda: torch.empty(0))

    def observe(self, call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        """Evaluate a call, and look at what it gives."""
        value = self.plain(call, args, kwargs)
        if isinstance(value, Tensor):
            self.last = value
        if call in self.read and self.ranged and isinstance(args[0], Tensor):
            self._input(self.read[call], args[0])
        return value

    def _input(self, source: Node, value: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(value))
        old = self.ranges.get(source, Range(low, high))
        self.ranges[source] = Range(min(old.low, low), max(old.high, high))
        self.samples.setdefault(source, Sample(SAMPLE)).add(value)


def _error(
    layer: Layer, seen: _LayerRanges, group: Sequence[LinearSite], outputs: Mapping[int, Tensor]
) -> float:
    """How far texts move the layer's output when one group is quantized."""
    source = group[0].source
    range_ = clipped(seen.ranges[source], seen.samples[source].values())
    weights = {**layer.weights, **{s.weight: _rounded(layer, s, range_) for s in group}}
    linears = {site.linear for site in group}
    moved = []
    for index, output in outputs.items():
        given = _Given(seen.plain, linears, range_)
        run_stage(layer.stage, weights, layer.entering(index), layer.texts[index], given.evaluate)
        moved.append(_distance(given.last, output))
    return float(torch.cat(moved).mean())


@dataclass
class _Given:
    """Calls with some linears' inputs quantized, and what the last call gave."""

    plain: Evaluate
    linears: set[Node]
    range_: Range
    last: Tensor = field(default_factory=lambda: torch.empty(0))

    def evaluate(self, call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        """Evaluate a call."""
        if call in self.linears and isinstance(args[0], Tensor):
            args = [_through(args[0], self.range_), *args[1:]]
        value = self.plain(call, args, kwargs)
        self.last = value if isinstance(value, Tensor) else self.last
        return value


def _through(x: Tensor, seen: Range) -> Tensor:
    """`x` quantized and dequantized."""
    scale, offset = input_params(seen, torch.float32)
    return (torch.round(x / scale + offset).clamp(-128, 127) - offset) * scale


def _rounded(layer: Layer, site: LinearSite, seen: Range) -> Tensor:
    """A linear's weight quantized and dequantized; its bias has no part in this."""
    weight = layer.weights[site.weight]
    parts = quantize_linear(weight, None, seen, torch.float32)
    return (parts["weight"].float() * parts["weight_scale"]).to(weight.dtype)


def _distance(moved: Tensor, output: Tensor) -> Tensor:
    """|y' - y|^2 / |y|^2 of each token [T]."""
    least = torch.finfo(torch.float32).tiny
    error, size = ((x.flatten(0, -2).square().sum(-1)) for x in (moved - output, output))
    return error / size.clamp(min=least)
