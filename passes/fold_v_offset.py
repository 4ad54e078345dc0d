"""Fold the offset of V into the bias of o_proj: it adds the same to every output of a head.

The weights of a query sum to one, so sum_j p_j (v8_j + o)*s = sum_j p_j v8_j*s + o*s, and

    W (u + c) + b = W u + (b + W c)      with c = o*s, each KV head's for all its query heads

The result needs no offset for V. Where the keys have none either, ops do that take no offset.

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
        o_weight: f16[96, 128] = stored("o.weight"),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(v_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=do, dst_dtype=5)
        v: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(x, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        reshape: f16[1, T, 128] = aten.reshape(attention_0, [1, -1, 128])
        linear: f16[1, T, 96] = aten.linear(reshape, o_weight)
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
        o_weight: f16[96, 128] = stored("o.weight"),
        o_bias_with_v: f16[96] = cast(matvec(stored("o.weight"), per_query(reshape(mul(neg(stored("z")), stored("s")), [2, 32]), 2)), f16),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(v_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=None, dst_dtype=5)
        v: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(x, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        reshape: f16[1, T, 128] = aten.reshape(attention_0, [1, -1, 128])
        linear: f16[1, T, 96] = aten.linear(reshape, o_weight, o_bias_with_v)
        return [linear]

Left alone where a sink takes part of the weights' sum; where anything but moves lies between the
attention and one linear; and where o_proj is W8A8, which quantizes what the constant would have
been in: there its zero point would be no whole number (see fold_v_offset_into_codes.py).

Bound: real_exact. W c is summed in float64 and rounded once, to the dtype of the bias.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    expression_of,
    is_call,
    is_parameter,
    tensor_type,
    users,
)
from kvc8.ir.types import TensorType
from kvc8.passes.fold_kv_scales import dequantizer
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
MOVES = (ATEN.reshape.default, ATEN.unsqueeze.default)


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def fold_v_offset(program: Program) -> Iterator[Remark]:
    """See the module."""
    for attention in program.calls(ops.paged_attention):
        back, reader, why = offset_site(attention)
        if why or back is None or reader is None:
            yield miss(attention, why)
            continue
        if not is_call(reader, ATEN.linear.default):
            yield miss(attention, "o_proj is W8A8; --fold kv folds it into the codes' zero points")
            continue
        _fold(program, attention, back, reader)
        yield hit(attention)


def offset_site(attention: Node) -> tuple[Node | None, Node | None, str]:
    """The dequantizer of an attention's V and what reads its output, or why its offset stays."""
    back = dequantizer(argument(attention, 2))
    if back is None or back.kwargs["offset"] is None:
        return None, None, "its V has no offset"
    if attention.args[9] is not None:
        return None, None, "a sink takes part of what its weights sum to"
    reader, why = projection(attention, back)
    return back, reader, why


def projection(attention: Node, back: Node) -> tuple[Node | None, str]:
    """The one linear, or the quantizer of one, that reads an attention; or why there is none."""
    if len(back.users) > 1 or len(argument(attention, 2).users) > 1:
        return None, "its dequantized V is read elsewhere"
    node = attention
    while len(found := list(users(node))) == len(node.users) == 1 and is_call(found[0], *MOVES):
        node = found[0]
    _, heads, dim = tensor_type(attention).shape
    if len(node.users) != 1 or len(found) != 1 or tensor_type(node).shape[-1] != heads * dim:
        return None, "more than one linear reads it"
    [reader] = found
    if is_call(reader, ATEN.linear.default) and is_parameter(argument(reader, 1)):
        return reader, ""
    consumers = [is_call(user, ops.quant_linear) for user in users(reader)]
    if is_call(reader, ops.quantize) and consumers == [True]:
        return reader, ""
    return None, f"{reader.name} reads it, which is no linear"


def per_query(expression: Expression, attention: Node) -> Expression:
    """Of [H*D], the channels of KV heads, what the query heads of an attention see: [Hq*D]."""
    _, heads, dim = (int(d) if isinstance(d, int) else 0 for d in tensor_type(attention).shape)
    kv_heads = int(tensor_type(argument(attention, 2)).shape[2])
    by_head = Expression("reshape", (expression, (kv_heads, dim)))
    return Expression("per_query", (by_head, heads // kv_heads))


def constant(attention: Node, back: Node) -> Expression:
    """What the offset of V adds to each channel of an attention's output, float32 [Hq*D]."""
    offset = back.kwargs["offset"]
    assert isinstance(offset, Node)
    added = Expression("mul", (expression_of(offset), expression_of(argument(back, 1))))
    return per_query(added, attention)


def _fold(program: Program, attention: Node, back: Node, linear: Node) -> None:
    x, weight, *rest = linear.args
    assert isinstance(weight, Node)
    added = Expression("matvec", (expression_of(weight), constant(attention, back)))
    if rest and isinstance(rest[0], Node):
        added = Expression("add", (expression_of(rest[0]), added))
    type_ = TensorType(tensor_type(weight).dtype, tensor_type(weight).shape[:1])
    name = weight.name.removesuffix("_weight") + "_bias_with_v"
    bias = program.placeholder(name, type_, cast(added, type_.dtype))
    linear.args = (x, weight, bias)
    back.kwargs = {**back.kwargs, "offset": None}
