"""Turn RoPE's slow pairs of q and k by an angle of their own, so that K's int8 steps cost least.

RoPE turns channels i and i + D/2 of a head as one pair, by an angle that grows with the position.
Turns of a plane commute, so a pair of k turned by one more angle, the same for every token, and the
pair of each q that meets it turned alike, give the scores that they gave. Folded into the weights:

    q_proj, k_proj      T W, T b        T: a turn of each pair in each KV head, q's as its KV head's

What int8 costs a score is the sum over channels of q_c^2 step_c^2 / 12, a step as wide as the
channel reaches. Over the whole context a fast pair reaches as far in each direction. A slow one
reaches far in one, and queries along it too: shared by both channels, that costs less. The angle is
the one of `ANGLES` with the least sum.

Asked for is what sink.py asks of V: that linears are quantized or stored more precisely than in
bfloat16, whose rounding would cost more than this gains.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.program import Program, argument, tensor_type
from kvc8.tools.quantizer.layers import Evaluate, run_stage
from kvc8.tools.quantizer.sites import LinearSite, sites
from kvc8.tools.quantizer.transforms.positions import (
    Table,
    Turning,
    find_turning,
    rows_at,
    starts_of,
)
from kvc8.tools.quantizer.transforms.sink import only, parts_of, sound
from kvc8.tools.quantizer.work import Layer

ANGLES = 8  # in a quarter turn, after which a pair's channels have changed places
STEP = math.pi / 2 / ANGLES
PLACES = 8  # of the context where each text is put
KEYS, QUERIES = 4, 8  # every so many of a text tell how far, and how strong, all are
LARGE = 1024.0  # so that a clamp would show
COMMUTES = 1e-3  # of the largest value: rounding in float32 is far below, another layout far above

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class PairSite:
    """An attention whose q and k each come from a linear of their own, through RoPE alone."""

    keys: Node  # rows [T, H, D]
    key: LinearSite
    query: LinearSite
    turning: Turning  # of K, and
    asking: Turning  # of q
    heads: int
    dim: int

    def stored(self) -> dict[str, Node]:
        """The stored tensors that are turned, by name."""
        return parts_of([n for s in (self.query, self.key) for n in (s.weight, s.bias)])


@dataclass(frozen=True)
class Places:
    """Where in the context texts are put."""

    positions: int  # tokens of context
    table: Table
    read: Read  # stored tensors

    def rows(self, turning: Turning, output: Tensor, starts: Sequence[int], layer: Layer) -> Tensor:
        """float32 rows of k or q [len(starts) * T, heads, D] that a linear's output gives there."""
        made = rows_at(turning, output, starts, layer.weights, self.read, self.table)
        return torch.cat([rows.float() for rows in made])


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [..., H, D] by angles [H, D/2], in radians."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def at_each_angle(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` of x [..., H, D], turned by each of the angles: [ANGLES, ...]."""
    ones = torch.ones(x.shape[-1] // 2)
    return torch.stack([reduce(turn_pairs(x, ones * i * STEP)) for i in range(ANGLES)])


def best_turns(tops: Tensor, power: Tensor) -> Tensor:
    """By how many steps to turn each pair, int64 [H, D/2]; tops, power: [ANGLES, H, D].

    It has the least sum of power * top^2 over its two channels.
    """
    turns: Tensor = (tops.square() * power).unflatten(-1, (2, -1)).sum(-2).argmin(0)
    return turns


def find_pairs(program: Program, checkpoint: Checkpoint, quantized: set[str]) -> list[PairSite]:
    """What can be turned; `quantized` are the modules whose weights become int8.

    Left alone: keys that several layers read, and where a norm, a fused linear or another layout of
    pairs lies between the linears and the scores, which is found by trying it.
    """
    by_linear = {site.linear: site for site in sites(program)}
    calls = program.calls(ops.paged_attention)
    rows = [argument(argument(call, 1), 1) for call in calls]
    layouts = dict[object, bool]()
    found = []
    for call, keys in zip(calls, rows, strict=True):
        key, query = find_turning(keys), find_turning(argument(call, 0))
        if not key or not query or rows.count(keys) > 1:
            continue
        if key.source in by_linear and query.source in by_linear:
            heads, dim = (int(str(size)) for size in tensor_type(keys).shape[1:])
            parts = by_linear[key.source], by_linear[query.source]
            site = PairSite(keys, *parts, key, query, heads, dim)
            whole = site.key.shape[0] == heads * dim and not site.query.shape[0] % (heads * dim)
            if whole and not dim % 2 and sound(site.stored(), checkpoint, quantized):
                found += [site] if _commutes(site, checkpoint.read, layouts) else []
    return found


def _commutes(site: PairSite, read: Read, layouts: dict[object, bool]) -> bool:
    """Whether turns of what both linears give come out as turns of q and k."""
    both = (site.turning, site.asking)
    if any(p.name.endswith("weight") for turning in both for p in turning.parameters):
        return False  # a norm's
    calls = [call for t in both for call in (*t.of_positions, *t.of_output, *t.of_both)]
    layout = tuple((call.target, *(a for a in call.args if isinstance(a, int))) for call in calls)
    if layout not in layouts:
        layouts[layout] = all(_turns(turning, site.dim, read) for turning in both)
    return layouts[layout]


def _turns(turning: Turning, dim: int, read: Read) -> bool:
    random = torch.Generator().manual_seed(0)
    width = int(str(tensor_type(turning.source).shape[-1]))
    x = torch.randn(1, 2, width, generator=random) * LARGE
    angles = torch.rand(width // dim, dim // 2, generator=random)
    turned = turn_pairs(x.unflatten(-1, (-1, dim)), angles).flatten(-2)
    table = Table(8)
    before, after = (
        torch.cat([*rows_at(turning, y, (1, 5), {}, read, table)]) for y in (x, turned)
    )
    wanted = turn_pairs(before, angles)
    return bool((after - wanted).abs().max() < COMMUTES * wanted.abs().max())


def turn_layer(layer: Layer, found: Sequence[PairSite], evaluate: Evaluate, places: Places) -> None:
    """Turn the slow pairs of a layer in its weights; nothing is passed on."""
    for site in found:
        slow = _slow(site, layer, places)
        if bool(slow.any()):
            angles = torch.zeros(site.heads, site.dim // 2)
            angles[:, slow] = best_turns(*_measured(site, slow, layer, evaluate, places)) * STEP
            turn(site, angles, layer.weights)


def _slow(site: PairSite, layer: Layer, places: Places) -> Tensor:
    """Which pairs RoPE turns by less than half a turn in all the context, bool [D/2].

    From one token to the next none turns by over a radian.
    """
    ones = torch.ones(1, 1, site.heads * site.dim)
    first, second = places.rows(site.turning, ones, (0, 1), layer)[:, 0].double()
    (x, y), (u, v) = first.chunk(2), second.chunk(2)
    slow: Tensor = torch.atan2(x * v - y * u, x * u + y * v).abs() * places.positions < math.pi
    return slow


def _measured(
    site: PairSite, slow: Tensor, layer: Layer, evaluate: Evaluate, places: Places
) -> tuple[Tensor, Tensor]:
    """How far K's slow pairs reach and how strong q is in them, at each angle: [ANGLES, H, C]."""
    part = only(layer.stage, (site.turning.source, site.asking.source))
    channels = slow.repeat(2)
    tops = torch.zeros(ANGLES, site.heads, int(channels.sum()))
    power = torch.zeros_like(tops)
    for index, text in enumerate(layer.texts):
        made = run_stage(part, layer.weights, layer.entering(index), text, evaluate)
        starts = starts_of(len(text), places.positions, PLACES)
        said, asked = made[site.turning.source][:, ::KEYS], made[site.asking.source][:, ::QUERIES]
        keys = places.rows(site.turning, said, starts, layer)[..., channels]
        queries = places.rows(site.asking, asked, starts, layer)[..., channels]
        grouped = queries.unflatten(1, (site.heads, -1)).transpose(1, 2)
        tops = tops.maximum(at_each_angle(keys, lambda x: x.abs().amax(0)))
        power += at_each_angle(grouped, lambda x: x.square().sum((0, 1)))
    return tops, power


def turn(site: PairSite, angles: Tensor, weights: dict[Node, Tensor]) -> None:
    """Fold the angles [H, D/2] into the weights and biases of q's and k's linears."""
    for linear in (site.query, site.key):
        own = angles.double().repeat_interleave(linear.shape[0] // (site.heads * site.dim), 0)
        for node in (linear.weight, linear.bias):
            if node is not None:
                by_head = weights[node].double().unflatten(0, (-1, site.dim))
                across = by_head.movedim((0, 1), (-2, -1))
                turned = turn_pairs(across, own).movedim((-2, -1), (0, 1)).flatten(0, 1)
                weights[node] = turned.to(weights[node].dtype).contiguous()
