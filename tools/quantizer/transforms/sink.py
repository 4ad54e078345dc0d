"""Turn V within each head so that what a text's first token gives lies along one channel.

Heads that look for nothing rest their attention on the first token ("attention sinks", Xiao et al.
2024), whose V hardly depends on what the token is. With most of the weight on one row, that row's
int8 error reaches every later token. Turned by a reflection that takes the mean of such rows to
the first channel, the others are about zero there, which has a code of its own:

    H = I - 2 w wᵀ, w = (u - e) / |u - e|      u: the mean's direction, e: the first channel's
    v_proj      H W, H b
    o_proj      W H                            H is its own inverse; a query head's is its KV head's

It computes what it did. What rotation.py asks of V is asked here too, and that both linears are
quantized or stored more precisely than in bfloat16, whose rounding would cost more than this gains.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.expression import stored_names
from kvc8.ir.program import Program, argument, expression_of, tensor_type
from kvc8.tools.quantizer.layers import Evaluate, LayerCalls, run_stage
from kvc8.tools.quantizer.sites import LinearSite, sites
from kvc8.tools.quantizer.transforms.heads import linears_of_v
from kvc8.tools.quantizer.transforms.roles import NotTurned
from kvc8.tools.quantizer.work import Layer


@dataclass(frozen=True)
class SinkSite:
    """The V of an attention: its rows, and the linears that make and read it."""

    rows: Node  # [T, H, D]
    made: LinearSite
    start: int  # the first of its outputs that are V's
    read: LinearSite

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads and their channels."""
        heads, dim = (int(str(size)) for size in tensor_type(self.rows).shape[1:])
        return heads, dim

    def stored(self) -> dict[str, Node]:
        """The stored tensors that are turned, by name."""
        return parts_of([self.made.weight, self.made.bias, self.read.weight])


def parts_of(nodes: Iterable[Node | None]) -> dict[str, Node]:
    """The stored tensors that some parameters are made of, by name."""
    given = [node for node in nodes if node is not None]
    return {name: node for node in given for name in stored_names(expression_of(node))}


def find_sinks(program: Program, checkpoint: Checkpoint, quantized: set[str]) -> list[SinkSite]:
    """What can be turned; `quantized` are the modules whose weights become int8."""
    by_linear = {site.linear: site for site in sites(program)}
    found = []
    for call in program.calls(ops.paged_attention):
        try:
            made, start, read = linears_of_v(call)
        except NotTurned:
            continue
        if made in by_linear and read in by_linear:
            rows = argument(argument(call, 2), 1)
            site = SinkSite(rows, by_linear[made], start, by_linear[read])
            found += [site] if sound(site.stored(), checkpoint, quantized) else []
    return found


def sound(stored: Mapping[str, Node], checkpoint: Checkpoint, quantized: set[str]) -> bool:
    """Whether tensors are stored as they are used, and hold what is turned."""
    for name, node in stored.items():
        coarse = checkpoint.tensors[name].dtype is torch.bfloat16
        kept = name.rpartition(".")[0] not in quantized
        if expression_of(node).op not in ("stored", "cast") or (coarse and kept):
            return False
    return True


def turn_layer(layer: Layer, found: Sequence[SinkSite], evaluate: Evaluate) -> None:
    """Turn V in a layer's weights by what its texts' first tokens give; nothing is passed on."""
    for site in found:
        part = only(layer.stage, [site.rows])
        first = torch.zeros(site.shape, dtype=torch.float64)
        for i, text in enumerate(layer.texts):
            made = run_stage(part, layer.weights, layer.entering(i), text, evaluate)
            first += made[site.rows][0]
        turn(site, reflections(first), layer.weights)


def only(stage: LayerCalls, nodes: Sequence[Node]) -> LayerCalls:
    """A stage of what some values are made from, which gives these values."""
    wanted = set(nodes)
    for call in reversed(stage.calls):
        if call in wanted:
            wanted.update(call.all_input_nodes)
    return replace(stage, calls=[c for c in stage.calls if c in wanted], keeps=list(nodes), dies={})


def reflections(rows: Tensor) -> Tensor:
    """What takes each of `rows` [H, D] to the first channel: float64 [H, D, D]."""
    tiny = torch.finfo(torch.float64).tiny
    away = rows / rows.norm(dim=-1, keepdim=True).clamp(min=tiny)
    away[:, 0] -= 1
    away = away / away.norm(dim=-1, keepdim=True).clamp(min=tiny)
    unit = torch.eye(rows.shape[-1], dtype=torch.float64)
    found: Tensor = unit - 2 * away[:, :, None] * away[:, None]
    return found


def turn(site: SinkSite, by: Tensor, weights: dict[Node, Tensor]) -> None:
    """Fold the matrices `by` [H, D, D], each its own inverse, into the linears' weights."""
    heads, dim = site.shape
    span = slice(site.start, site.start + heads * dim)
    for node in (site.made.weight, site.made.bias):
        if node is not None:
            value = weights[node].to(torch.float64, copy=True)
            by_head = value[span].reshape(heads, dim, -1)
            value[span] = (by @ by_head).reshape(value[span].shape)
            weights[node] = value.to(weights[node].dtype)
    value = weights[site.read.weight]
    by_head = value.double().unflatten(-1, (heads, -1, dim))
    made = torch.einsum("ohgd,hde->ohge", by_head, by).flatten(1)
    weights[site.read.weight] = made.to(value.dtype)
