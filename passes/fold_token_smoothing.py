"""Take what smooths the channels of K and V out of the cache: the query and the result have it.

q·(k8*t/c) = (q/c)·(k8*t), with t the scale of a token and c one a channel of each KV head; and
sum_j p_j (v8_j*t_j/c) = (sum_j p_j v8_j*t_j)/c. The attention then reads codes with a scale a token
and no more, as the NPU's op does.

before:
    def quantized(
        q: f16[T, 4, 8],
        k: f16[T, 16],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 8] = cache(),
        k_smooth_0: f16[16] = cast(smoothing(stored("ks"), None), f16),
        k_steps_0: f32[N, S, 1, 1] = cache_steps(),
    ):
        quantize_tokens: (i8[T, 16], f32[T]) = kvc8.quantize_tokens(k, k_smooth_0)
        getitem: i8[T, 16] = quantize_tokens[0]
        getitem_1: f32[T] = quantize_tokens[1]
        reshape: f32[T, 1, 1] = aten.reshape(getitem_1, [-1, 1, 1])
        k_steps_0_new: f32[N, S, 1, 1] = kvc8.cache_write(k_steps_0, reshape, slots)
        reshape_1: i8[T, 2, 8] = aten.reshape(getitem, [-1, 2, 8])
        k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, reshape_1, slots)
        wide: f16[N, S, 2, 8] = kvc8.dequantize_tokens(k_new_0, k_steps_0_new, k_smooth_0, f16)
        attention_0: f16[T, 4, 8] = kvc8.paged_attention(q, wide, wide, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        return [attention_0, k_new_0, k_steps_0_new]

after:
    def lowering(
        q: f16[T, 4, 8],
        k: f16[T, 16],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 8] = cache(),
        k_smooth_0: f16[16] = cast(smoothing(stored("ks"), None), f16),
        k_steps_0: f32[N, S, 1, 1] = cache_steps(),
        k_unsmooth_0: f16[4, 8] = cast(reshape(per_query(reshape(reciprocal(cast(cast(smoothing(stored("ks"), None), f16), f32)), [2, 8]), 2), [4, 8]), f16),
        k_unsmooth_1: f16[4, 8] = cast(reshape(per_query(reshape(reciprocal(cast(cast(smoothing(stored("ks"), None), f16), f32)), [2, 8]), 2), [4, 8]), f16),
    ):
        quantize_tokens: (i8[T, 16], f32[T]) = kvc8.quantize_tokens(k, k_smooth_0)
        getitem: i8[T, 16] = quantize_tokens[0]
        getitem_1: f32[T] = quantize_tokens[1]
        reshape: f32[T, 1, 1] = aten.reshape(getitem_1, [-1, 1, 1])
        k_steps_0_new: f32[N, S, 1, 1] = kvc8.cache_write(k_steps_0, reshape, slots)
        reshape_1: i8[T, 2, 8] = aten.reshape(getitem, [-1, 2, 8])
        k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, reshape_1, slots)
        mul: f16[T, 4, 8] = aten.mul.Tensor(q, k_unsmooth_0)
        dequantize_tokens: f16[N, S, 2, 8] = kvc8.dequantize_tokens(k_new_0, k_steps_0_new, None, f16)
        dequantize_tokens_1: f16[N, S, 2, 8] = kvc8.dequantize_tokens(k_new_0, k_steps_0_new, None, f16)
        paged_attention: f16[T, 4, 8] = kvc8.paged_attention(mul, dequantize_tokens, dequantize_tokens_1, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        attention_1: f16[T, 4, 8] = aten.mul.Tensor(paged_attention, k_unsmooth_1)
        return [attention_1, k_new_0, k_steps_0_new]

Left alone where something else reads what the cache gives back, and where its scales are static. A
prompt that sees its own float rows (`--prefill-kv float`) has nothing to take out: this does not run.

Bound: real_exact. A query and a result each round once more, to the dtype of the model.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.projection import per_query
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

MUL = torch.ops.aten.mul.Tensor
F32 = torch.float32


@rewrite(takes=Stage.QUANTIZED, gives=Stage.LOWERING, contract="real_exact")
def fold_token_smoothing(program: Program) -> Iterator[Remark]:
    """See the module."""
    for attention in program.calls(ops.paged_attention):
        k, v = argument(attention, 1), argument(attention, 2)
        if not all(is_call(side, ops.dequantize_tokens) for side in (k, v)):
            yield miss(attention, "its K and V have no scale a token")
            continue
        if any(set(side.users) != {attention} for side in (k, v)):
            yield miss(attention, "what its cache gives back is read elsewhere")
            continue
        factors = [_inverse(program, attention, argument(side, 2)) for side in (k, v)]
        q = program.call(attention, MUL, argument(attention, 0), factors[0])
        sides = [_codes(program, attention, side) for side in (k, v)]
        inner = program.call(attention, ops.paged_attention, q, *sides, *attention.args[3:])
        out = program.call(attention, MUL, inner, factors[1], name=attention.name)
        attention.replace_all_uses_with(out)
        yield hit(attention)


def _codes(program: Program, attention: Node, side: Node) -> Node:
    """What the cache gives back, smoothed as it lies there."""
    codes, steps, _, dtype = side.args
    return program.call(attention, ops.dequantize_tokens, codes, steps, None, dtype)


def _inverse(program: Program, attention: Node, smooth: Node) -> Node:
    """1/smooth of the KV head that each query head sees, [Hq, D] in the dtype of the query."""
    type_ = tensor_type(attention)
    own = TensorType(type_.dtype, type_.shape[1:])
    each = Expression("reciprocal", (cast(expression_of(smooth), F32),))
    sizes = tuple(int(size) for size in own.shape)
    made = cast(Expression("reshape", (per_query(each, attention), sizes)), own.dtype)
    return program.placeholder(smooth.name.replace("smooth", "unsmooth"), own, made)
