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
    expression_of,
    is_call,
    tensor_type,
)
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.projection import constant, offset_site
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten


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
