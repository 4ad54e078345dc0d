"""The recipe `minmax`: ranges are what all texts reach, and K is measured after RoPE.

    K and V      symmetric per channel, K where the cache stores it
    activations  static per tensor, from the least and greatest value of all texts; of experts, and
                 of linears that are to be, a scale a token
    weights      symmetric per output channel, computed in float32

One sweep: a layer is measured in float32 and written.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.checkpoint.w8a8 import (
    Range,
    dynamic_part_types,
    finite,
    kv_scale,
    part_types,
    quantize_dynamic,
    quantize_linear,
)
from kvc8.ir.errors import ModelError
from kvc8.ir.run import Value
from kvc8.tools.quantizer.layers import attend_in_float32, plain
from kvc8.tools.quantizer.model import QuantPlan, copy_rest
from kvc8.tools.quantizer.recipes.mixtures import (
    LABEL,
    Experts,
    Reached,
    expert_types,
    missed,
    write_experts,
)
from kvc8.tools.quantizer.sites import Cached, LinearSite, cached, readers, sites
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
    labels: Mapping[str, str],
) -> QuantPlan:
    """Make the model; gives what was written. `chosen` and `mixed` are what to quantize.

    `labels` are those of the linears that are not W8A8.
    """
    caches = cached(work.program, work.checkpoint)
    widths = {cache.name: cache.width for cache in caches} if kv else {}
    plan = plan_of(work, chosen, mixed, widths, notes, labels)
    entries = plan.entries()
    writer = work.writer(entries)
    found = work.sweep(
        texts, lambda layer: _layer(work, layer, chosen, mixed, caches, plan, writer)
    )
    copy_rest(plan, writer, entries, {f"{module}.weight" for module in plan.linears})
    return with_missed(plan, found)


def plan_of(
    work: Work,
    chosen: Sequence[LinearSite],
    mixed: Sequence[Experts],
    widths: Mapping[str, int],
    notes: Mapping[str, object],
    labels: Mapping[str, str],
) -> QuantPlan:
    """What recipes of ours write."""
    dtype = config_dtype(work.checkpoint)
    linears = {
        site.module: dynamic_part_types(*site.shape)
        if labels.get(site.module) == LABEL
        else part_types(*site.shape, dtype)
        for site in chosen
    }
    linears |= expert_types(work.checkpoint, mixed)
    all_labels = {**labels, **{module: LABEL for kind in mixed for module in kind.every}}
    return QuantPlan(
        work.checkpoint, work.program, dtype, linears, widths, notes=notes, labels=all_labels
    )


def with_missed(plan: QuantPlan, found: Sequence[Mapping[str, Tensor]]) -> QuantPlan:
    """The plan with a note on the experts that no text has reached, if there are any."""
    names = missed(found)
    return replace(plan, notes={**plan.notes, "experts_not_reached": names}) if names else plan


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
    for reached in seen.experts.values():
        write_experts(plan, writer, reached.kind)
    for cache in rows if plan.kv else []:
        scale = kv_scale(seen.tops[cache.rows], plan.dtype)
        writer.put(f"{cache.name}.kv_cache_scale", sound(f"{cache.name}.kv_cache_scale", scale))
        writer.put(f"{cache.name}.kv_cache_offset", torch.zeros_like(scale))
    return {name: x for reached in seen.experts.values() for name, x in reached.found.items()}


class _Ranges:
    """The range of what linears and experts read, and the absmax of what is cached."""

    def __init__(
        self, read: Mapping[Node, Node], rows: Container[Node], mixed: Sequence[Experts]
    ) -> None:
        self._read, self._rows = read, rows
        self.ranges: dict[Node, Range] = {}
        self.tops: dict[Node, Tensor] = {}
        self.experts = {kind.call: Reached(kind) for kind in mixed}

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
    if plan.labels.get(site.module) == LABEL:
        put_linear(writer, site.module, quantize_dynamic(weights[site.weight]))
        return
    put_linear(writer, site.module, quantize_linear(weights[site.weight], bias, seen, plan.dtype))


def put_linear(writer: ModelWriter, module: str, parts: Mapping[str, Tensor]) -> None:
    """Write the tensors of a linear, whose scales must be numbers."""
    for part, tensor in parts.items():
        if part in ("weight_scale", "input_scale"):
            sound(f"{module}.{part}", tensor)
    for part, tensor in parts.items():
        writer.put(f"{module}.{part}", tensor)


def sound(name: str, scale: Tensor) -> Tensor:
    """A scale, which must be a number that its dtype holds."""
    if not bool(scale.isfinite().all()):
        kind = str(scale.dtype).removeprefix("torch.")
        raise ModelError(name, f"is beyond what {kind} holds", "check the model's weights")
    return scale
