"""Fold the scale of V into o_proj: the attention then adds up codes.

sum_j p_j (v8_j + o)*s = s * sum_j p_j (v8_j + o), and s, one a channel of each KV head, goes into

- the input scale of a W8A8 o_proj, one a channel: round(s*u/s_in + z) = round(u/(s_in/s) + z);
- the columns of a float o_proj: W diag(s) u = (W diag(s)) u.

The attention's output is then at most 128 (255 with an offset), so float16 holds it.

before:
    def lowering(
        x: f16[T, 4, 32],
        v_new_0: i8[N, S, 2, 32],
        k: f16[N, S, 2, 32],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        ds: f32[64] = stored("s"),
        do: f32[64] = neg(stored("z")),
        o_input_scale: f32[1] = stored("is"),
        o_input_zero: f32[1] = stored("iz"),
        o_int8: i8[96, 128] = stored("o.weight"),
        o_deq_scale: f32[96] = stored("ds"),
        o_quant_bias: i32[96] = stored("qb"),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(v_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=do, dst_dtype=5)
        v: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(x, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        reshape: f16[1, T, 128] = aten.reshape(attention_0, [1, -1, 128])
        quantize: i8[1, T, 128] = kvc8.quantize(reshape, o_input_scale, o_input_zero)
        linear: f16[1, T, 96] = kvc8.quant_linear(quantize, o_int8, o_deq_scale, o_quant_bias, f16)
        return [linear]

after:
    def lowering(
        x: f16[T, 4, 32],
        v_new_0: i8[N, S, 2, 32],
        k: f16[N, S, 2, 32],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        do: f32[64] = neg(stored("z")),
        o_int8: i8[96, 128] = stored("o.weight"),
        o_deq_scale: f32[96] = stored("ds"),
        o_quant_bias: i32[96] = stored("qb"),
        o_input_scale_of_codes: f32[128] = div(stored("is"), per_query(reshape(stored("s"), [2, 32]), 2)),
        o_input_zero_each: f32[128] = expand(stored("iz"), [128]),
        ds_one: f32[64] = expand(values([1.0], f32), [64]),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(v_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds_one, offset=do, dst_dtype=5)
        v: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(x, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        reshape: f16[1, T, 128] = aten.reshape(attention_0, [1, -1, 128])
        quantize: i8[1, T, 128] = kvc8.quantize(reshape, o_input_scale_of_codes, o_input_zero_each)
        linear: f16[1, T, 96] = kvc8.quant_linear(quantize, o_int8, o_deq_scale, o_quant_bias, f16)
        return [linear]

Left alone where anything but moves lies between the attention and one linear; and where o_proj is
float and `weights` is off, because another phase uses the weight as it is: two copies would cost
more than this is worth.

Bound: real_exact. The product with s, the quotient by s_in and the scale s_in/s each round once, so
the argument of the rounding moves by a few units of itself, and a code by one where that crosses
the middle between two. A float weight rounds once more, to its own dtype.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.attention import dequantizer
from kvc8.passes.matchers.projection import per_query, projection
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ONE = Expression("values", ((1.0,), torch.float32))


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def fold_v_scale(program: Program, weights: bool = True) -> Iterator[Remark]:
    """See the module."""
    for attention in program.calls(ops.paged_attention):
        back = dequantizer(argument(attention, 2))
        if back is None:
            yield miss(attention, "its V is float")
            continue
        reader, why = projection(attention, back)
        if reader is not None and not is_call(reader, ops.quantize) and not weights:
            why = "o_proj is float and another phase uses its weight as it is"
        if reader is None or why:
            yield miss(attention, why)
            continue
        scale = per_query(expression_of(argument(back, 1)), attention)
        fold = _into_quantizer if is_call(reader, ops.quantize) else _into_weight
        fold(program, reader, scale)
        _unscale(program, back)
        yield hit(attention)


def _into_quantizer(program: Program, quantize: Node, scale: Expression) -> None:
    x, in_scale, zero = quantize.args
    assert isinstance(in_scale, Node)
    each = TensorType(torch.float32, tensor_type(quantize).shape[-1:])
    name = in_scale.name.removesuffix("_each").removesuffix("_scale")
    expression = Expression("div", (expression_of(in_scale), scale))
    new = program.placeholder(f"{name}_scale_of_codes", each, expression)
    if isinstance(zero, Node) and tensor_type(zero) != each:
        wide = Expression("expand", (expression_of(zero), each.shape))
        zero = program.placeholder(f"{name}_zero_each", each, wide)
    quantize.args = (x, new, zero)


def _into_weight(program: Program, linear: Node, scale: Expression) -> None:
    x, weight, *rest = linear.args
    assert isinstance(weight, Node)
    scaled = Expression("mul", (cast(expression_of(weight), torch.float32), scale))
    expression = cast(scaled, tensor_type(weight).dtype)
    new = program.placeholder(f"{weight.name}_of_codes", tensor_type(weight), expression)
    linear.args = (x, new, *rest)


def _unscale(program: Program, back: Node) -> None:
    codes, scale = back.args
    assert isinstance(scale, Node)
    type_ = tensor_type(scale)
    expression = Expression("expand", (ONE, type_.shape))
    back.args = (codes, program.placeholder(f"{scale.name}_one", type_, expression))
