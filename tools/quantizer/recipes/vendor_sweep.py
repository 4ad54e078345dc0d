"""The first sweep of --recipe msmodelslim: the float model, layer by layer, with m3's scales on.

It finds m3's scales, how far K and V reach before RoPE, and how hard each linear's input is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.run import Value
from kvc8.tools.quantizer import eager
from kvc8.tools.quantizer.layers import plain
from kvc8.tools.quantizer.sites import LinearSite
from kvc8.tools.quantizer.transforms.smoothing import NormGroup, scales, smooth
from kvc8.tools.quantizer.work import Layer, Work

FEATURES = 5  # texts that a linear's range and deviation are taken from
Found = Mapping[str, Tensor]


def measure(
    work: Work,
    layer: Layer,
    linears: Sequence[LinearSite],
    grouped: Sequence[NormGroup],
    *,
    m3: bool,
    kv: bool,
) -> Found:
    """Smooth a layer, run the texts, and measure K, V and what linears read."""
    found: dict[str, Tensor] = {}
    base = plain(work.checkpoint, eager.attend)
    if mine := [group for group in grouped if group.norm in layer.weights]:
        held: dict[Node, Tensor] = {}
        sources = {group.source for group in mine}

        def hold(call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
            value = base(call, args, kwargs)
            if call in sources and isinstance(value, Tensor):
                held[call] = value
            return value

        layer.run(0, layer.weights, hold)
        for group in mine:
            s = scales(held[group.source], [layer.weights[w] for w in group.weights])
            found[f"smooth {group.norm_name}"] = s
        for group in mine:
            smooth(layer.weights, group, found[f"smooth {group.norm_name}"])
    watch = _Watch({site.linear: site.module for site in linears}, kv)
    for index in range(int(m3), len(layer.texts)):

        def observe(call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
            value = base(call, args, kwargs)
            watch.see(call, args, value)
            return value

        layer.run(index, layer.weights, observe)
        watch.text += 1
    return {**found, **watch.found()}


class _Watch:
    """How far K and V reach over all texts, and what linears read in the first five."""

    def __init__(self, modules: Mapping[Node, str], kv: bool) -> None:
        self._modules, self._kv = modules, kv
        self.text = 0
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}
        self._read: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def see(self, call: Node, args: Sequence[Value], value: Value) -> None:
        """See a call."""
        module = self._modules.get(call)
        if module is None or not isinstance(value, Tensor):
            return
        if self._kv and module.endswith((".k_proj", ".v_proj")):
            rows = value.view(-1, value.shape[-1])
            low, high = rows.amin(0), rows.amax(0)
            old = self._ends.get(module, (low, high))
            self._ends[module] = torch.min(old[0], low), torch.max(old[1], high)
        if self.text < FEATURES and isinstance(x := args[0], Tensor):
            self._read[module] = _features(x, self._read.get(module))

    def found(self) -> Found:
        """By name: the ends of K and V, and how many deviations a linear's input reaches."""
        made: dict[str, Tensor] = {}
        for module, (low, high) in self._ends.items():
            made |= {f"low {module}": low, f"high {module}": high}
        for module, (high, low, deviation) in self._read.items():
            made[f"range {module}"] = torch.maximum(high.abs(), low.abs()) / deviation
        return made


def _features(
    x: Tensor, old: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest and least value, and the greatest deviation.

    The deviation is taken after a shift by the sum of each channel's extremes; half of the sum
    would center it, and msModelSlim does not halve.
    """
    rows = x.reshape(-1, x.shape[-1])
    deviation = torch.std(rows - (rows.amax(0) + rows.amin(0)))
    if old is None:
        return x.max(), x.min(), deviation
    high, low, widest = old
    return torch.max(high, x.max()), torch.min(low, x.min()), torch.max(widest, deviation)
