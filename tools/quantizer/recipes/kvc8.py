"""The recipe `kvc8`, the default: a rotated model whose ranges are chosen by the error they cause.

    model        rotated (rotation.py), so that no channel stands out; it computes what it did
    K            symmetric per channel, after RoPE, at many places of the context (positions.py),
                 RoPE's slow pairs turned so that steps cost less (pairs.py);
                 with --k-offsets from its least to its largest value
    V            symmetric per channel, turned within each head, the first token's apart (sink.py)
    norms        balanced against their linears where the stream could not be turned (balancing.py)
    activations  static per tensor; the range clipped to where the squared error is least; of
                 experts, and of linears that are to be, a scale a token
    weights      symmetric per output channel; rounding errors made up for (rounding.py)

K and V reach further on other text than on what was seen. Tokens drawn at random, and the texts
once more with line breaks, widen what is seen, and a margin is chosen on texts that the ranges do
not know. Few texts cannot tell how other kinds of text differ from them, so a margin has a floor, a
higher one for channels of K that RoPE hardly turns: those gain nothing from many places. One sweep
over the layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.checkpoint.layouts import fact
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.checkpoint.w8a8 import (
    kv_params_with_offset,
    kv_scale,
    quantize_dynamic,
    quantize_linear,
)
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program
from kvc8.tools.quantizer.layers import attend_in_float32, plain
from kvc8.tools.quantizer.model import QuantPlan, copy_rest
from kvc8.tools.quantizer.recipes.measurements import MARGIN, Measurements
from kvc8.tools.quantizer.recipes.minmax import plan_of, put_linear, sound, with_missed
from kvc8.tools.quantizer.recipes.mixtures import LABEL, Experts, write_experts
from kvc8.tools.quantizer.sites import Cached, LinearSite, cached, readers, sites, vocabulary
from kvc8.tools.quantizer.transforms import balancing, pairs, sink
from kvc8.tools.quantizer.transforms.positions import (
    Table,
)
from kvc8.tools.quantizer.transforms.roles import Norm
from kvc8.tools.quantizer.transforms.rotation import find_rotation, rotate, untie
from kvc8.tools.quantizer.transforms.rounding import compensated, error_shares
from kvc8.tools.quantizer.work import Layer, Texts, Work
from kvc8.tools.quantizer.writer import ModelWriter

NAME = "kvc8: rotated, ranges by error, K after RoPE"
RANDOM_TEXTS, RANDOM_TOKENS = 2, 256  # of tokens drawn at random
UNSAID = 8192  # positions of a model that does not say how many it takes
OFFSET_MARGIN = 1.15  # on half the range of K's channels that have offsets
SHARED = ("input_scale", "input_offset")  # by all linears that read a value


@dataclass(frozen=True)
class RecipeOptions:
    """What the recipe is told."""

    kv: bool = True
    rotate: bool = True
    positions: int | None = None  # K's scales are for a context of so many tokens; None: all
    seed: int = 0
    k_offsets: bool = False


def rotated(
    checkpoint: Checkpoint,
    program: Program,
    linears: bool,
    options: RecipeOptions,
    directory: Path,
) -> tuple[Checkpoint, str | None]:
    """The model, rotated and written to a directory, and what is not rotated of it, and why.

    `program` becomes that of the rotated model. Where no linear is to be quantized only V is
    turned, which leaves a tied lm_head tied.
    """
    if not options.rotate:
        return checkpoint, "is not rotated (--rotate off)"
    coarse = any(t.dtype is torch.bfloat16 for t in checkpoint.tensors.values())
    found = find_rotation(program, linears, options.seed, coarse)
    if isinstance(found, str):
        return checkpoint, f"is not rotated ({found})"
    left = f"has a residual stream that is not rotated ({found.why})" if found.why else None
    made = rotate(checkpoint, found, directory)
    untie(program, found)
    return made, left


def quantize(
    work: Work,
    texts: Texts,
    chosen: Sequence[LinearSite],
    options: RecipeOptions,
    notes: Mapping[str, object],
    mixed: Sequence[Experts] = (),
    labels: Mapping[str, str] = MappingProxyType({}),
    more: Texts = (),
) -> QuantPlan:
    """Make the model; gives what was written. `chosen` and `mixed` are what to quantize.

    `labels` are those of the linears that are not W8A8. `more` are texts that only widen the reach
    of K and V.
    """
    caches = cached(work.program, work.checkpoint)
    if options.k_offsets:
        check_offsets(work.program)
    widths = {cache.name: cache.width for cache in caches} if options.kv else {}
    plan = plan_of(work, chosen, mixed, widths, notes, labels)
    entries = plan.entries()
    writer = work.writer(entries)
    widening = [*random_texts(work, options.seed), *more] if options.kv else []
    positions = _positions(work.checkpoint.config, options.positions)
    stored = work.checkpoint.tensors
    norms = balancing.norms(work.program, chosen, lambda name: load(stored[name]))
    turned = options.kv and options.rotate
    quantized = set(plan.linears)
    sinks = sink.find_sinks(work.program, work.checkpoint, quantized) if turned else []
    # Offsets share out a pair's reach by themselves.
    apart = turned and not options.k_offsets
    slow = pairs.find_pairs(work.program, work.checkpoint, quantized) if apart else []
    everything = [*widening, *texts]
    table = Table(max(positions, *map(len, everything)))
    recipe = _Recipe(
        *(work, plan, writer, chosen, mixed, caches, options, len(widening)),
        *(norms, sinks, slow, positions, table),
    )
    found = work.sweep(everything, recipe.layer)
    made = {f"{module}.weight" for module in plan.linears} | balancing.names(norms)
    made |= {name for site in sinks for name in site.stored()}
    made |= {name for site in slow for name in site.stored()}
    copy_rest(plan, writer, entries, made)
    return with_missed(plan, found)


def check_offsets(program: Program) -> None:
    """Raises ModelError where softmax does not take an offset of K off again."""
    for call in program.calls(ops.paged_attention):
        softcap, sinks = call.args[8:10]
        if softcap or sinks is not None:
            what = "has a soft cap" if softcap else "has a sink"
            so = f"{what} in its attention, which an offset of K would move"
            raise ModelError(f"{call.meta.get('origin')}", so, "leave --k-offsets out")


def _positions(config: Mapping[str, object], asked: int | None) -> int:
    """How many positions K is measured at: by default all that the model takes.

    Beyond them K clips, and what that costs grows with every token (docs/accuracy.md).
    """
    most = fact(config, "max_position_embeddings")  # tables of RoPE end there
    if not isinstance(most, int):
        return asked or UNSAID
    return min(asked or most, most)


def random_texts(work: Work, seed: int) -> list[list[int]]:
    """Texts of tokens that follow no language: what K and V reach there, text may reach too."""
    random = torch.Generator().manual_seed(seed)
    size = (RANDOM_TEXTS, RANDOM_TOKENS)
    drawn: list[list[int]] = torch.randint(
        vocabulary(work.program), size, generator=random
    ).tolist()
    return drawn


@dataclass(frozen=True)
class _Recipe:
    """What the work on each layer needs."""

    work: Work
    plan: QuantPlan
    writer: ModelWriter
    chosen: Sequence[LinearSite]
    mixed: Sequence[Experts]
    caches: Sequence[Cached]
    options: RecipeOptions
    widening: int  # the first so many texts only widen the reach of K and V
    norms: Mapping[Node, Norm]  # to balance, by what they give
    sinks: Sequence[sink.SinkSite]  # whose V is turned once more
    slow: Sequence[pairs.PairSite]  # whose q and k are turned
    positions: int  # tokens of context that K's scales are for
    table: Table  # of what RoPE makes of positions

    def layer(self, layer: Layer) -> Mapping[str, Tensor]:
        """Measure a layer on all texts, and write it."""
        calls = set(layer.stage.calls)
        linears = [site for site in self.chosen if site.linear in calls]
        caches = [c for c in self.caches if c.rows in calls] if self.plan.kv else []
        # Also what float linears read is looked at: a broken layer is found where it breaks.
        read = readers([site for site in sites(self.work.program) if site.linear in calls])
        self._turn(layer)
        quantized = {site.source for site in linears}
        seen = Measurements(
            *(self.work.checkpoint, self.mixed, self.widening, self.positions, self.table),
            *(layer, read, quantized, caches),
        )
        for index in range(len(layer.texts)):
            seen.text(index)
            layer.run(index, layer.weights, seen.observe)
        for source in quantized:
            self._write([s for s in linears if s.source is source], seen, layer.weights)
        for reached in seen.experts.values():
            write_experts(self.plan, self.writer, reached.kind)
        for cache in caches:
            self._write_cache(cache, seen)
        return {name: x for reached in seen.experts.values() for name, x in reached.found.items()}

    def _turn(self, layer: Layer) -> None:
        """Turn a layer's q, k and V in its weights; what stays float is written as it becomes."""
        stored, calls = self.work.checkpoint.tensors, set(layer.stage.calls)
        sinks = [site for site in self.sinks if site.rows in calls]
        slow = [site for site in self.slow if site.keys in calls]
        evaluate = plain(self.work.checkpoint, attend_in_float32)
        sink.turn_layer(layer, sinks, evaluate)
        places = pairs.Places(self.positions, self.table, lambda n: load(stored[n]))
        pairs.turn_layer(layer, slow, evaluate, places)
        changed = [*(site.stored() for site in sinks), *(site.stored() for site in slow)]
        for name, node in (part for parts in changed for part in parts.items()):
            module, _, last = name.rpartition(".")
            if last != "weight" or module not in self.plan.linears:
                self.writer.put(name, sound(name, layer.weights[node].to(stored[name].dtype)))

    def _write(
        self, group: Sequence[LinearSite], seen: Measurements, weights: Mapping[Node, Tensor]
    ) -> None:
        """Write the linears that read one value, rounded as the one that they are together."""
        source, dtype = group[0].source, self.plan.dtype
        matrices = [weights[site.weight] for site in group]
        s = self._balance(source, seen, matrices) if source in self.norms else None
        hessian = seen.hessians[source]
        if s is not None:
            matrices = [matrix * s for matrix in matrices]
            hessian = hessian / (s[:, None] * s)
        rounding = partial(compensated, shares=error_shares(hessian))
        matrix, bias = torch.cat(matrices), _biases(group, weights)
        if self.plan.labels.get(group[0].module) == LABEL:
            parts = quantize_dynamic(matrix, rounding)
        else:
            parts = quantize_linear(matrix, bias, seen.range_of(source, s), dtype, rounding)
        sizes = [len(each) for each in matrices]
        for i, site in enumerate(group):
            own = {n: t if n in SHARED else t.split(sizes)[i] for n, t in parts.items()}
            put_linear(self.writer, site.module, own)

    def _balance(self, source: Node, seen: Measurements, matrices: Sequence[Tensor]) -> Tensor:
        """Write a norm balanced against its linears; gives what these are multiplied by."""
        norm = self.norms[source]
        stored = load(self.work.checkpoint.tensors[norm.name])
        low, high = seen.ends[source]
        sample = seen.samples[source].values()
        new, s = balancing.balance(stored, norm.plus, torch.maximum(-low, high), sample, matrices)
        self.writer.put(norm.name, new)
        return s

    def _write_cache(self, cache: Cached, seen: Measurements) -> None:
        reach = seen.reaches[cache.rows]
        floor = seen.floors.get(cache.rows, torch.full_like(reach.top, MARGIN))
        margin = reach.margin(seen.queries.get(cache.rows), floor)
        name = f"{cache.name}.kv_cache_scale"
        scale = kv_scale(reach.top * margin, self.plan.dtype)
        offset = torch.zeros_like(scale)
        if self.options.k_offsets and cache.side == "k":
            scale, offset = kv_params_with_offset(*reach.range(OFFSET_MARGIN), self.plan.dtype)
        self.writer.put(name, sound(name, scale))
        self.writer.put(f"{cache.name}.kv_cache_offset", offset)


def _biases(group: Sequence[LinearSite], weights: Mapping[Node, Tensor]) -> Tensor | None:
    """The biases of linears after each other, 0 where some have none; None where all have none."""
    if all(site.bias is None for site in group):
        return None
    none = (torch.zeros(site.shape[0]) for site in group)
    return torch.cat(
        [zero if s.bias is None else weights[s.bias] for s, zero in zip(group, none, strict=True)]
    )
