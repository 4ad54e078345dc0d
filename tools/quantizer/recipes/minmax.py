"""The recipe `minmax`: ranges are what all texts reach, and K is measured after RoPE.

    K and V      symmetric per channel, K where the cache stores it
    activations  static per tensor, from the least and greatest value of all texts
    weights      symmetric per output channel, computed in float32

One sweep: a layer is measured in float32 and written.
"""

import math
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.capture.trace import config_dtype
from kvc8.ir.checkpoint.w8a8 import Range, finite, kv_scale, part_types, quantize_linear
from kvc8.ir.errors import ModelError
from kvc8.ir.run import Value
from kvc8.tools.quantizer.layers import attend_in_float32, plain
from kvc8.tools.quantizer.model import QuantPlan, copy_rest
from kvc8.tools.quantizer.recipes.mixtures import ExpertRanges, Experts
from kvc8.tools.quantizer.sites import Cached, LinearSite, cached, readers, sites
from kvc8.tools.quantizer.stored import load
from kvc8.tools.quantizer.work import Layer, Texts, Work
from kvc8.tools.quantizer.writer import ModelWriter

NAME = "min-max, K after RoPE"


def quantize(
    work: Work,
    texts: Texts,
    chosen: Sequence[LinearSite],
    mixed: Sequence[Experts],
    kv: bool,
    notes: Mapping[str, object],
) -> QuantPlan:
    """Make the model; gives what was written. `chosen` and `mixed` are what to quantize."""
    dtype = config_dtype(work.checkpoint)
    caches = cached(work.program, work.checkpoint)
    linears = {site.module: part_types(*site.shape, dtype) for site in chosen}
    weights = [f"{m}.weight" for kind in mixed for modules in kind.modules for m in modules]
    for name in weights:
        out, width = work.checkpoint.tensors[name].shape
        linears[name.removesuffix(".weight")] = part_types(out, width, dtype)
    widths = {cache.name: cache.width for cache in caches} if kv else {}
    plan = QuantPlan(work.checkpoint, work.program, dtype, linears, widths, notes=notes)
    entries = plan.entries()
    writer = work.writer(entries)
    work.sweep(texts, lambda layer: _layer(work, layer, chosen, mixed, caches, plan, writer))
    copy_rest(plan, writer, entries, {f"{module}.weight" for module in linears})
    return plan


def _layer(
    work: Work,
    layer: Layer,
    chosen: Sequence[LinearSite],
    mixed: Sequence[Experts],
    caches: Sequence[Cached],
    plan: QuantPlan,
    writer: ModelWriter,
) -> Mapping[str, Tensor]:
    calls = set(layer.stage.calls)
    rows = [cache for cache in caches if cache.rows in calls]
    # Also what float linears read is looked at, so that a broken layer is found where it breaks.
    read = readers([site for site in sites(work.program) if site.linear in calls])
    seen = _Ranges(read, {cache.rows for cache in rows}, [k for k in mixed if k.call in calls])
    base = plain(work.checkpoint, attend_in_float32)

    def observe(call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        value = base(call, args, kwargs)
        seen.see(call, args, value)
        return value

    for index in range(len(layer.texts)):
        layer.run(index, layer.weights, observe)
    for site in chosen:
        if site.linear in calls:
            _write_linear(plan, writer, site, layer.weights, seen.ranges[site.source])
    for ranges in seen.experts.values():
        _write_experts(plan, writer, ranges)
    for cache in rows if plan.kv else []:
        scale = kv_scale(seen.tops[cache.rows], plan.dtype)
        writer.put(f"{cache.name}.kv_cache_scale", sound(f"{cache.name}.kv_cache_scale", scale))
        writer.put(f"{cache.name}.kv_cache_offset", torch.zeros_like(scale))
    return {}


class _Ranges:
    """The range of what linears and experts read, and the absmax of what is cached."""

    def __init__(
        self, read: Mapping[Node, Node], rows: Container[Node], mixed: Sequence[Experts]
    ) -> None:
        self._read, self._rows = read, rows
        self.ranges: dict[Node, Range] = {}
        self.tops: dict[Node, Tensor] = {}
        self.experts = {kind.call: ExpertRanges(kind) for kind in mixed}

    def see(self, call: Node, args: Sequence[Value], value: Value) -> None:
        """See a call, its arguments and what it gives."""
        if call in self.experts:
            self.experts[call].see(args)
        if call in self._read and isinstance(args[0], Tensor):
            source = self._read[call]
            self.ranges[source] = _widened(source, args[0], self.ranges.get(source))
        if call in self._rows and isinstance(value, Tensor):
            self.tops[call] = _raised(call, value, self.tops.get(call))


def _widened(call: Node, value: Tensor, old: Range | None) -> Range:
    low, high = (float(end) for end in torch.aminmax(value))
    new = Range(low, high)
    if not finite(new):
        raise ModelError(
            f"{call.meta.get('origin') or call.name}",
            "gives a value that is not finite",
            "check the model's weights",
        )
    return new if old is None else Range(min(old.low, low), max(old.high, high))


def _raised(call: Node, rows: Tensor, old: Tensor | None) -> Tensor:
    top = rows.abs().amax(0).flatten().float()
    if not math.isfinite(float(top.max())):
        what = "caches a value that is not finite"
        raise ModelError(f"{call.meta.get('origin')}", what, "check the model's weights")
    return top if old is None else top.maximum(old)


def _write_linear(
    plan: QuantPlan,
    writer: ModelWriter,
    site: LinearSite,
    weights: Mapping[Node, Tensor],
    seen: Range,
) -> None:
    bias = weights[site.bias] if site.bias is not None else None
    _put(writer, site.module, quantize_linear(weights[site.weight], bias, seen, plan.dtype))


def _write_experts(plan: QuantPlan, writer: ModelWriter, seen: ExpertRanges) -> None:
    for expert, modules in enumerate(seen.kind.modules):
        for module in modules:
            weight = load(plan.checkpoint.tensors[f"{module}.weight"])
            parts = quantize_linear(weight, None, seen.range(expert), plan.dtype)
            _put(writer, module, parts)


def _put(writer: ModelWriter, module: str, parts: Mapping[str, Tensor]) -> None:
    for part in ("weight_scale", "input_scale"):
        sound(f"{module}.{part}", parts[part])
    for part, tensor in parts.items():
        writer.put(f"{module}.{part}", tensor)


def sound(name: str, scale: Tensor) -> Tensor:
    """A scale, which must be a number that its dtype holds."""
    if not bool(scale.isfinite().all()):
        kind = str(scale.dtype).removeprefix("torch.")
        raise ModelError(name, f"is beyond what {kind} holds", "check the model's weights")
    return scale
