"""Keep the KV cache in int8 with a scale for each token, which is made as the token is written.

A static scale must hold for every token that comes; this one is max|row| / 127 of the row's own K or
V, all heads together, so nothing is clipped. A row is only as fine as its largest channel allows.
So channels are brought to about one size first: `smooth` multiplies them, and what reads the cache
divides by it. It is made of the checkpoint's scales, of which only the ratio matters here:
(2^e / s)^0.8, with 2^e the least power of two above all s, and s widened by the zero point where
there is one, for the codes of tokens have none. It is 2048 at most, which half precision holds, so a
channel that calibration saw empty stays small. A power less than 1 leaves a channel that reaches far
now and then finer steps than the others: 0.8 was the best of 0.7, 0.8, 0.9, 1 and 1.1 for SmolLM2,
on text that no table of docs/accuracy.md shows.

before:
    def captured(
        k: f16[T, 2, 8],
        slots: i32[T],
        k_cache_0: f16[N, S, 2, 8] = cache(stored("ks"), None, "post-rope"),
    ):
        k_new_0: f16[N, S, 2, 8] = kvc8.cache_write(k_cache_0, k, slots)
        neg: f16[N, S, 2, 8] = aten.neg(k_new_0)
        return [neg, k_new_0]

after:
    def quantized(
        k: f16[T, 2, 8],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 8] = cache(),
        k_smooth_0: f16[16] = cast(smoothing(stored("ks"), None), f16),
        k_steps_0: f32[N, S, 1, 1] = cache_steps(),
    ):
        reshape: f16[T, 16] = aten.reshape(k, [-1, 16])
        quantize_tokens: (i8[T, 16], f32[T]) = kvc8.quantize_tokens(reshape, k_smooth_0)
        getitem: i8[T, 16] = quantize_tokens[0]
        getitem_1: f32[T] = quantize_tokens[1]
        reshape_1: f32[T, 1, 1] = aten.reshape(getitem_1, [-1, 1, 1])
        k_steps_0_new: f32[N, S, 1, 1] = kvc8.cache_write(k_steps_0, reshape_1, slots)
        reshape_2: i8[T, 2, 8] = aten.reshape(getitem, [-1, 2, 8])
        k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, reshape_2, slots)
        dequantize_tokens: f16[N, S, 2, 8] = kvc8.dequantize_tokens(k_new_0, k_steps_0_new, k_smooth_0, f16)
        neg: f16[N, S, 2, 8] = aten.neg(dequantize_tokens)
        return [neg, k_new_0, k_steps_0_new]

A cache for which the checkpoint has no scale is left alone and stays float: unsmoothed, the keys of
models with a bias in k_proj would lose most of what they say. One of latents (passes/
fold_latent_attention.py) is too, and a model all of whose caches are such is in order.

Bound: with t the scale of the token, t/2/smooth, and one rounding to the dtype of the cache.
"""

from collections.abc import Callable, Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    expression_of,
    is_cache,
    is_call,
    tensor_type,
    users,
)
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.latent import holds_latent
from kvc8.passes.rewrite import Remark, hit, keep, miss, rewrite

RESHAPE = torch.ops.aten.reshape.default


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far what a cache gives back may be from what went in: see the module."""
    if not is_call(new, ops.dequantize_tokens) or not is_call(old, ops.cache_write):
        return torch.zeros(())
    steps, smooth = look(argument(new, 1)), look(argument(new, 2))
    heads, dim = (int(size) for size in tensor_type(old).shape[-2:])
    return steps / 2 / smooth.view(heads, dim)


@rewrite(
    takes=Stage.CAPTURED,
    gives=Stage.QUANTIZED,
    contract="quantizing",
    bound=bound,
    required="quantize the KV cache of this model first, with kvc8-quantize",
)
def insert_token_quant(program: Program) -> Iterator[Remark]:
    """See the module."""
    steps = []
    for write in program.calls(ops.cache_write):
        cache = argument(write, 0)
        if holds_latent(write):
            yield keep(write, "it holds latents, which are small and stay float")
            continue
        if not is_cache(cache) or not expression_of(cache).args:
            yield miss(write, "the checkpoint has no scale for this cache")
            continue
        steps.append(_quantize(program, write, cache))
        yield hit(write, "a scale a token")
    [output] = program.graph.find_nodes(op="output")
    output.args = ([*output.args[0], *steps],)


def _quantize(program: Program, write: Node, cache: Node) -> Node:
    """Make an int8 cache of it; gives what its tokens' scales are after the write."""
    type_, readers = tensor_type(cache), list(users(write))
    heads, dim = (int(size) for size in type_.shape[2:])
    smooth = _smooth(program, cache)
    rows = program.call(write, RESHAPE, argument(write, 1), [-1, heads * dim])
    both = program.call(write, ops.quantize_tokens, rows, smooth)
    codes, scales = (program.call(write, getitem, both, i) for i in range(2))
    own = TensorType(torch.float32, (*type_.shape[:2], 1, 1))
    name = cache.name.replace("cache", "steps")
    kept = program.placeholder(name, own, Expression("cache_steps"))
    scales = program.call(write, RESHAPE, scales, [-1, 1, 1])
    steps = program.call(
        write, ops.cache_write, kept, scales, argument(write, 2), name=f"{name}_new"
    )
    cache.meta["type"] = TensorType(torch.int8, type_.shape)
    cache.meta["expression"] = Expression("cache")
    write.update_arg(1, program.call(write, RESHAPE, codes, [-1, heads, dim]))
    write.meta["type"] = program.infer(write)
    back = program.call(write.next, ops.dequantize_tokens, write, steps, smooth, type_.dtype)
    back.meta["origin"] = write.meta.get("origin", "")
    for reader in readers:
        reader.replace_input_with(write, back)
    return steps


def _smooth(program: Program, cache: Node) -> Node:
    scale, zero, *_ = expression_of(cache).args
    type_ = tensor_type(cache)
    width = int(type_.shape[2]) * int(type_.shape[3])
    made = cast(Expression("smoothing", (scale, zero)), type_.dtype)
    name = cache.name.replace("cache", "smooth")
    return program.placeholder(name, TensorType(type_.dtype, (width,)), made)
