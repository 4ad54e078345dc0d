"""The recipe `msmodelslim`: what the vendor's convert_quant_weights.py makes, bit for bit.

Two sweeps over the layers. The first runs the float model: it chooses m3's scales, and finds how
far K and V reach and which layers hurt. The second runs the texts with rounded weights and
inputs, each linear with the range it has seen so far, and writes what comes out.

What is peculiar about msModelSlim stands where it is done, here and in vendor_sweep.py,
vendor_math.py, observers.py and smoothing.py:

    K is measured before RoPE, and clips after it; kvc8-compile repairs that (repair_rope_scales)
    m3 looks at the first text only, and at the float model without the other layers' scales
    ranges for method 3 and for --disable-level come from the first five texts
    a linear's quantizer sees texts one by one, and rounds the first with what it knows by then
    --disable-level leaves out single linears, also of q, k and v, which runtimes pack into one
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.checkpoint.layouts import layer_index
from kvc8.ir.checkpoint.w8a8 import part_types
from kvc8.ir.errors import ModelError
from kvc8.ir.program import argument
from kvc8.ir.run import Value
from kvc8.tools.quantizer import eager
from kvc8.tools.quantizer.layers import plain
from kvc8.tools.quantizer.model import Layout, Parts, QuantPlan, copy_rest, is_norm
from kvc8.tools.quantizer.observers import WIDE, Histogram, MinMax
from kvc8.tools.quantizer.recipes.mixtures import experts
from kvc8.tools.quantizer.recipes.vendor_math import (
    Params,
    fake_quantize,
    fake_quantized_weight,
    linear_parts,
    params,
)
from kvc8.tools.quantizer.recipes.vendor_sweep import Found, measure
from kvc8.tools.quantizer.sites import LinearSite, cached, disabled_by_name, is_down, sites
from kvc8.tools.quantizer.transforms.smoothing import NormGroup, groups, smooth
from kvc8.tools.quantizer.work import Layer, Texts, Work
from kvc8.tools.quantizer.writer import ModelWriter

LARGE, LARGE_FLOAT = 8192, 5  # the hidden size of 70B models, and their first layers left float


@dataclass(frozen=True)
class VendorOptions:
    """What the vendor's script can be told."""

    act_method: int  # 1, 2 or 3
    m3: bool
    level: int  # how many linears --disable-level leaves out
    disabled: Sequence[str]
    down_proj: bool
    kv: bool
    symmetric: bool
    dtype: torch.dtype
    layout: Layout


def quantize(work: Work, texts: Texts, options: VendorOptions) -> QuantPlan:
    """Make the model; gives what was written."""
    linears = sites(work.program)
    if mixed := experts(work.program):
        what = "--recipe msmodelslim does not know linears of experts"
        raise ModelError(f"{mixed[0].modules[0][0]}", what, "use --recipe minmax")
    if options.kv:
        _refuse_normed_keys(work)
    grouped = groups(linears) if options.m3 else []
    # With m3 the first text runs once more, through the model as it was.
    runs = [texts[0], *texts] if options.m3 else texts
    layers = work.sweep(
        runs, lambda layer: measure(work, layer, linears, grouped, m3=options.m3, kv=options.kv)
    )
    found = {name: tensor for layer in layers for name, tensor in layer.items()}
    chosen = _choose(work, linears, found, options)
    plan = _plan(work, chosen, found, options)
    entries = plan.entries()
    writer = work.writer(entries)
    work.sweep(texts, lambda layer: _write(work, layer, chosen, grouped, found, plan, writer))
    smoothed = {group.norm_name for group in grouped}
    copy_rest(plan, writer, entries, smoothed)
    _write_norms(plan, writer, smoothed)
    return plan


@dataclass(frozen=True)
class _Chosen:
    linears: Mapping[str, LinearSite]  # to be quantized, by module
    histograms: frozenset[str]  # those whose range is a histogram's


def _choose(
    work: Work, linears: Sequence[LinearSite], found: Found, options: VendorOptions
) -> _Chosen:
    """Leave out what the script's rules, the user and --disable-level name."""
    left = disabled_by_name(linears, options.disabled)
    left |= {site.module for site in linears if is_down(site) and not options.down_proj}
    bf16 = config_dtype(work.checkpoint) is torch.bfloat16
    if work.checkpoint.config.get("hidden_size") == LARGE and not bf16:
        early = [s.module for s in linears if (layer_index(s.module.split(".")) or 0) < LARGE_FLOAT]
        left |= set(early)
    reach = {site.module: float(found[f"range {site.module}"]) for site in linears}
    hardest = sorted((m for m in reach if m not in left), key=lambda m: -reach[m])
    left |= set(hardest[: options.level])
    chosen = {site.module: site for site in linears if site.module not in left}
    method = options.act_method
    wide = [m for m in chosen if method == 2 or (method == 3 and reach[m] <= WIDE)]
    return _Chosen(chosen, frozenset(wide))


def _plan(work: Work, chosen: _Chosen, found: Found, options: VendorOptions) -> QuantPlan:
    kv: dict[str, int] = {}
    for cache in cached(work.program, work.checkpoint) if options.kv else []:
        if f"low {cache.name}" not in found:
            what = "is no linear of this model, whose output msModelSlim would measure"
            raise ModelError(cache.name, what, "use --recipe minmax")
        kv[cache.name] = cache.width
    linears = {
        module: _types(site, options.dtype, module in chosen.histograms)
        for module, site in chosen.linears.items()
    }
    floats, smoothed = options.dtype, options.m3
    checkpoint, program, layout = work.checkpoint, work.program, options.layout
    asymmetric = not options.symmetric
    return QuantPlan(
        checkpoint, program, options.dtype, linears, kv, floats, smoothed, layout, asymmetric
    )


def _refuse_normed_keys(work: Work) -> None:
    """A norm between k_proj and RoPE: K's scales would be those of another value.

    msModelSlim takes such a model's graph apart wrongly and fails.
    """
    for node in work.program.graph.nodes:
        if (origin := str(node.meta.get("origin", ""))).endswith(".k_norm"):
            what = "norms K, and msModelSlim measures it before"
            raise ModelError(origin, what, "use --recipe minmax, which measures after RoPE")


def _types(site: LinearSite, dtype: torch.dtype, histogram: bool) -> Parts:
    """A histogram is float32 whatever the model is, and so are its scale and offset.

    In a bfloat16 model they are rounded to that.
    """
    types = dict(part_types(*site.shape, dtype))
    if histogram and dtype is not torch.bfloat16:
        types |= {part: (torch.float32, (1,)) for part in ("input_scale", "input_offset")}
    return types


def _write(
    work: Work,
    layer: Layer,
    chosen: _Chosen,
    grouped: Sequence[NormGroup],
    found: Found,
    plan: QuantPlan,
    writer: ModelWriter,
) -> Found:
    """Run the texts through a layer that rounds, and write what it has become."""
    weights = layer.weights
    mine = {s.linear: s for s in chosen.linears.values() if s.weight in weights}
    for group in grouped:
        if group.norm in weights:
            smooth(weights, group, found[f"smooth {group.norm_name}"])
            _write_norm(plan, writer, group.norm_name, weights[group.norm])
    inputs = _Inputs({s.source: m in chosen.histograms for m, s in chosen.linears.items()})
    _run_rounded(work, layer, mine, inputs)
    for site in mine.values():
        bias = weights[site.bias] if site.bias is not None else None
        parts = linear_parts(weights[site.weight], bias, inputs.params[site.source])
        for part, tensor in parts.items():
            writer.put(f"{site.module}.{part}", tensor)
    for name in plan.kv:
        if layer_index(name.split(".")) == layer.stage.layer:
            at = params(found[f"low {name}"], found[f"high {name}"], not plan.asymmetric)
            writer.put(f"{name}.kv_cache_scale", at.scale)
            writer.put(f"{name}.kv_cache_offset", at.offset)
    return {}


class _Inputs:
    """The quantizers of what linears read; q, k and v have one each, which see the same."""

    def __init__(self, histograms: Mapping[Node, bool]) -> None:
        self._observers = {n: Histogram() if h else MinMax() for n, h in histograms.items()}
        self.params: dict[Node, Params] = {}
        self._rounded: dict[Node, Tensor] = {}

    def rounded(self, source: Node, x: Tensor) -> Tensor:
        """A text's values with the range of this text and those before."""
        if source not in self._rounded:
            observer = self._observers[source]
            observer.update(x)
            at = params(*observer.range(), symmetric=False)
            if x.dtype is torch.bfloat16:
                at = Params(at.scale.to(x.dtype), at.offset.to(x.dtype))
            self.params[source] = at
            self._rounded[source] = fake_quantize(x, at)
        return self._rounded[source]

    def next_text(self) -> None:
        """Forget the values of a text."""
        self._rounded.clear()


def _run_rounded(
    work: Work, layer: Layer, mine: Mapping[Node, LinearSite], inputs: _Inputs
) -> None:
    base = plain(work.checkpoint, eager.attend)
    new = {s.weight: fake_quantized_weight(layer.weights[s.weight]) for s in mine.values()}

    def evaluate(call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        if call in mine and isinstance(args[0], Tensor):
            args = [inputs.rounded(argument(call, 0), args[0]), *args[1:]]
        return base(call, args, kwargs)

    for index in range(len(layer.texts)):
        layer.run(index, {**layer.weights, **new}, evaluate)
        inputs.next_text()


def _write_norms(plan: QuantPlan, writer: ModelWriter, smoothed: set[str]) -> None:
    """The norms that m3 leaves as they are; it makes each of them one with a bias."""
    for name, tensor in plan.checkpoint.tensors.items():
        module = name.rpartition(".")[0]
        if plan.smoothed and is_norm(module) and name not in smoothed:
            writer.put(f"{module}.bias", torch.zeros(tensor.shape))
            if plan.layout == "safe_tensor":
                writer.copy(f"{module}.module.weight", tensor)
                writer.put(f"{module}.module.bias", torch.zeros(tensor.shape))


def _write_norm(plan: QuantPlan, writer: ModelWriter, name: str, weight: Tensor) -> None:
    module = name.rpartition(".")[0]
    for prefix in (module, f"{module}.module")[: 1 + (plan.layout == "safe_tensor")]:
        writer.put(f"{prefix}.weight", weight)
        writer.put(f"{prefix}.bias", torch.zeros(len(weight)))
