"""Widen K scales that were measured before RoPE to bounds that hold after it.

RoPE turns the channels i and j of a pair into each other, so a scale measured before it says
little about one channel after it, and channels clip. A rotation keeps k_i^2 + k_j^2, hence
|k'_i| <= 127 * sqrt(s_i^2 + s_j^2) for every position: that is the new scale of both. Where cos
and sin carry a factor (YaRN's attention factor), so does the bound. Zero points measured before
RoPE lose their meaning with it; the bound is symmetric, from the larger end of each channel's
range, s_i * max(|-128 - z_i|, |127 - z_i|) / 127.

With a reader of stored tensors the remark of a site says what it changes: the largest ratio r of a
new scale to its old one, and 1 - 1/r, the share of what RoPE can reach in that channel that the
old scale would cut off. After the repair nothing is cut off.

before:
    def captured(
        k: f16[1, 2, T, 8],
        cos: f16[1, 1, T, 8],
        sin: f16[1, 1, T, 8],
        slots: i32[T],
        k_cache_0: f16[N, S, 2, 8] = cache(stored("ks"), None, "pre-rope"),
    ):
        mul: f16[1, 2, T, 8] = aten.mul.Tensor(k, cos)
        slice_1: f16[1, 2, T, 4] = aten.slice.Tensor(k, 3, 0, 4)
        slice_2: f16[1, 2, T, 4] = aten.slice.Tensor(k, 3, 4, 9223372036854775807)
        neg: f16[1, 2, T, 4] = aten.neg(slice_2)
        cat: f16[1, 2, T, 8] = aten.cat([neg, slice_1], -1)
        mul_1: f16[1, 2, T, 8] = aten.mul.Tensor(cat, sin)
        add: f16[1, 2, T, 8] = aten.add.Tensor(mul, mul_1)
        transpose: f16[1, T, 2, 8] = aten.transpose.int(add, 1, 2)
        reshape: f16[T, 2, 8] = aten.reshape(transpose, [-1, 2, 8])
        k_new_0: f16[N, S, 2, 8] = kvc8.cache_write(k_cache_0, reshape, slots)
        neg_1: f16[N, S, 2, 8] = aten.neg(k_new_0)
        return [neg_1, k_new_0]

after:
    def captured(
        k: f16[1, 2, T, 8],
        cos: f16[1, 1, T, 8],
        sin: f16[1, 1, T, 8],
        slots: i32[T],
        k_cache_0: f16[N, S, 2, 8] = cache(round_up(rope_bound(stored("ks"), None, 4, 8, "half"), f16), None, "repaired"),
    ):
        mul: f16[1, 2, T, 8] = aten.mul.Tensor(k, cos)
        slice_1: f16[1, 2, T, 4] = aten.slice.Tensor(k, 3, 0, 4)
        slice_2: f16[1, 2, T, 4] = aten.slice.Tensor(k, 3, 4, 9223372036854775807)
        neg: f16[1, 2, T, 4] = aten.neg(slice_2)
        cat: f16[1, 2, T, 8] = aten.cat([neg, slice_1], -1)
        mul_1: f16[1, 2, T, 8] = aten.mul.Tensor(cat, sin)
        add: f16[1, 2, T, 8] = aten.add.Tensor(mul, mul_1)
        transpose: f16[1, T, 2, 8] = aten.transpose.int(add, 1, 2)
        reshape: f16[T, 2, 8] = aten.reshape(transpose, [-1, 2, 8])
        k_new_0: f16[N, S, 2, 8] = kvc8.cache_write(k_cache_0, reshape, slots)
        neg_1: f16[N, S, 2, 8] = aten.neg(k_new_0)
        return [neg_1, k_new_0]

Scales measured after RoPE are left alone, and those of a layer without RoPE. Where a norm lies
between k_proj and RoPE, scales measured before it say nothing at all: that is an error, and so is
anything else there that is not known.
The graph does not change, and so neither does any float value: bit_exact.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvc8.ir import ops
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Arg, Expression, Read, furthest, make, stored
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    expression_of,
    is_cache,
    tensor_type,
)
from kvc8.passes.matchers.rope import Rope, find_rope, from_linear
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten


@rewrite(takes=Stage.CAPTURED, gives=Stage.CAPTURED, contract="bit_exact")
def repair_rope_scales(program: Program, read: Read | None = None) -> Iterator[Remark]:
    """See the module."""
    for write in program.calls(ops.cache_write):
        cache = argument(write, 0)
        if not is_cache(cache) or len(expression_of(cache).args) < 3:
            continue
        scale, zero, calibrated = expression_of(cache).args
        if calibrated is None:
            continue  # V, which no one rotates
        if calibrated != "pre-rope":
            yield miss(write, "its scales were measured after RoPE")
            continue
        rope = find_rope(argument(write, 1))
        if not from_linear(rope.source if rope else argument(write, 1)):
            what = "its K scales were measured at k_proj and a norm follows it"
            where = write.meta.get("origin", write.name)
            raise IRError(where, what, "quantize again after RoPE")
        if rope is None:
            yield miss(write, "no RoPE lies between its k_proj and the cache")
            continue
        bound = rope.bound(scale, zero)
        rounded = Expression("round_up", (bound, tensor_type(cache).dtype))
        cache.meta["expression"] = Expression("cache", (rounded, None, "repaired"))
        told = f"; {_told(scale, zero, rope, read)}" if read else ""
        yield hit(write, f"channels paired by {rope.kind}, {rope.distance} apart{told}")


def _told(scale: Arg, zero: Arg, rope: Rope, read: Read) -> str:
    assert isinstance(scale, Expression)
    made = make(zero, read) if isinstance(zero, Expression) else None
    ratio = largest_ratio(make(scale, read), made, rope)
    if not math.isfinite(ratio):
        return "the checkpoint holds no scales to compare"
    cut = f"up to {1 - 1 / ratio:.0%} of what a channel can reach was cut off"
    return f"K scales grow up to {ratio:.2f} times; {cut}"


def largest_ratio(scale: Tensor, zero: Tensor | None, rope: Rope) -> float:
    """The most that RoPE can reach in a channel over what a scale measured before it holds.

    Scale and zero are float32 [H, D]. The ratio is 1 or more, or NaN where a scale is not positive.
    """
    given = {"scale": scale, "zero": zero if zero is not None else torch.zeros_like(scale)}
    zeros = None if zero is None else stored("zero")
    bound = make(rope.bound(stored("scale"), zeros), given.__getitem__)
    held = scale if zero is None else scale * furthest(zero) / 127
    return float((bound / held).max())
