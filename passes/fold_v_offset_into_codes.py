"""Fold the offset of V into the zero points and the bias of a W8A8 o_proj.

The offset adds a constant c = o*s to each channel of the attention's output u, which o_proj
quantizes: x8 = round((u + c)/s_in + z). In steps of the quantizer that is t = c/s_in, no whole
number, and the device's zero points are whole. So n = round(t) goes into the zero point, one a
channel, and the rest, f = t - n, into the bias:

    x8' = round(u/s_in + z + n),   y = sum_k w (x8' - z + f) = w·x8' + (b + round(sum_k w f))

(b holds -sum_k w z already.) This is exact where every t is a whole number, and where t is the same
in all channels n is one number.

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
        ds: f32[64] = stored("s"),
        o_int8: i8[96, 128] = stored("o.weight"),
        o_deq_scale: f32[96] = stored("ds"),
        o_input_scale_each: f32[128] = expand(stored("is"), [128]),
        o_input_zero_each: f32[128] = add(stored("iz"), round(div(per_query(reshape(mul(neg(stored("z")), stored("s")), [2, 32]), 2), stored("is")))),
        o_quant_bias_with_v: i32[96] = cast(round(add(stored("qb"), matvec(stored("o.weight"), sub(div(per_query(reshape(mul(neg(stored("z")), stored("s")), [2, 32]), 2), stored("is")), round(div(per_query(reshape(mul(neg(stored("z")), stored("s")), [2, 32]), 2), stored("is"))))))), i32),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(v_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=None, dst_dtype=5)
        v: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(x, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        reshape: f16[1, T, 128] = aten.reshape(attention_0, [1, -1, 128])
        quantize: i8[1, T, 128] = kvc8.quantize(reshape, o_input_scale_each, o_input_zero_each)
        linear: f16[1, T, 96] = kvc8.quant_linear(quantize, o_int8, o_deq_scale, o_quant_bias_with_v, f16)
        return [linear]

Left alone where V's offset may not be folded at all (see fold_v_offset.py), and where o_proj is
float, whose bias takes it exactly.

Bound: x8' + f stands for (u + c)/s_in + z moved by at most half a step, as x8 does. In the range of
codes both are within s_in/2 of u + c; at an end of it x8' reaches f further, or stops f short, and
|f| <= 1/2 keeps it within s_in/2 there too. The bias is rounded to a whole number of deq_scale.
Together y moves by at most deq_scale*(sum_k |w| + 1/2) in each output, and the int32 sums of a rank
by at most sum_k |w| + 1/2 over its own part of w.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops, rank_ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type, users
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.projection import constant, offset_site
from kvc8.passes.rewrite import Remark, hit, miss, rewrite


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far each output of o_proj may move: see the module."""
    if is_call(new, rank_ops.int_linear):
        return look(argument(new, 1)).double().abs().sum(1) + 0.5
    if not is_call(new, ops.quant_linear):
        return torch.zeros(())
    weight, deq_scale = (look(argument(new, i)) for i in (1, 2))
    return deq_scale * (weight.double().abs().sum(1) + 0.5)


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="quantizing", bound=bound)
def fold_v_offset_into_codes(program: Program) -> Iterator[Remark]:
    """See the module."""
    for attention in program.calls(ops.paged_attention):
        back, reader, why = offset_site(attention)
        if why or back is None or reader is None:
            yield miss(attention, why)
            continue
        if not is_call(reader, ops.quantize):
            yield miss(attention, "o_proj is float; its bias takes the offset")
            continue
        _fold(program, attention, back, reader)
        yield hit(attention)


def _fold(program: Program, attention: Node, back: Node, quantize: Node) -> None:
    x, scale, zero = quantize.args
    assert isinstance(scale, Node)
    [linear] = users(quantize)
    steps = Expression("div", (constant(attention, back), expression_of(scale)))
    whole = Expression("round", (steps,))
    width = int(tensor_type(quantize).shape[-1])
    name = scale.name.removesuffix("_scale")
    moved = Expression("add", (expression_of(zero), whole)) if isinstance(zero, Node) else whole
    each = TensorType(torch.float32, (width,))
    wide = Expression("expand", (expression_of(scale), (width,)))
    quantize.args = (
        x,
        program.placeholder(f"{name}_scale_each", each, wide),
        program.placeholder(f"{name}_zero_each", each, moved),
    )
    _fold_bias(program, linear, Expression("sub", (steps, whole)))
    back.kwargs = {**back.kwargs, "offset": None}


def _fold_bias(program: Program, linear: Node, rest: Expression) -> None:
    """Add w·rest, rounded, to the int32 bias of a linear."""
    weight = argument(linear, 1)
    at = 2 if is_call(linear, rank_ops.int_linear) else 3  # a rank adds the share of its own inputs
    bias = linear.args[at] if len(linear.args) > at else None
    added = Expression("matvec", (expression_of(weight), rest))
    if isinstance(bias, Node):
        added = Expression("add", (expression_of(bias), added))
    type_ = TensorType(torch.int32, tensor_type(weight).shape[:1])
    name = weight.name.removesuffix("_int8") + "_quant_bias_with_v"
    expression = cast(Expression("round", (added,)), torch.int32)
    new = program.placeholder(name, type_, expression)
    linear.args = (*linear.args[:at], new, *linear.args[at + 1 :])
