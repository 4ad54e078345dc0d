"""Fold the scale of K into the query: the attention then compares queries with codes.

q·((k8 + o)*s) = (q*s)·(k8 + o), with s one a channel of each KV head. What goes into the query is
s/2^e, at most 1, so that float16 cannot overflow; 2^e, the least power of two above the scales of a
head, takes the place of the scale in the attention, where it is exact. s/2^e goes, by preference,

- through RoPE into q_proj, where both channels of each RoPE pair have one scale: a rotation of
  (s a, s b) is s times that of (a, b). A W8A8 linear takes it in deq_scale, which covers its bias
  as (x8·w8 + b)*deq_scale does; a float one in the rows of its weight and in its bias;
- into the weight of q_norm, where all channels of all heads have one scale;
- else into the query itself, which costs a multiplication.

before:
    def lowering(
        x8: i8[1, T, 64],
        k_new_0: i8[N, S, 2, 32],
        v: f16[N, S, 2, 32],
        cos: f16[1, 1, T, 32],
        sin: f16[1, 1, T, 32],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        ds: f32[64] = reshape(rope_bound(stored("ks"), None, 16, 32, "half"), [64]),
        q_int8: i8[128, 64] = stored("q.weight"),
        q_deq_scale: f32[128] = stored("ds"),
        q_quant_bias: i32[128] = stored("qb"),
    ):
        linear: f16[1, T, 128] = kvc8.quant_linear(x8, q_int8, q_deq_scale, q_quant_bias, f16)
        reshape: f16[1, T, 4, 32] = aten.reshape(linear, [1, -1, 4, 32])
        transpose: f16[1, 4, T, 32] = aten.transpose.int(reshape, 1, 2)
        mul: f16[1, 4, T, 32] = aten.mul.Tensor(transpose, cos)
        slice_1: f16[1, 4, T, 16] = aten.slice.Tensor(transpose, 3, 0, 16)
        slice_2: f16[1, 4, T, 16] = aten.slice.Tensor(transpose, 3, 16, 9223372036854775807)
        neg: f16[1, 4, T, 16] = aten.neg(slice_2)
        cat: f16[1, 4, T, 32] = aten.cat([neg, slice_1], -1)
        mul_1: f16[1, 4, T, 32] = aten.mul.Tensor(cat, sin)
        add: f16[1, 4, T, 32] = aten.add.Tensor(mul, mul_1)
        transpose_1: f16[1, T, 4, 32] = aten.transpose.int(add, 1, 2)
        q: f16[T, 4, 32] = aten.reshape(transpose_1, [-1, 4, 32])
        flatten: i8[N, S, 64] = aten.flatten.using_ints(k_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=None, dst_dtype=5)
        k: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(q, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        return [attention_0]

after:
    def lowering(
        x8: i8[1, T, 64],
        k_new_0: i8[N, S, 2, 32],
        v: f16[N, S, 2, 32],
        cos: f16[1, 1, T, 32],
        sin: f16[1, 1, T, 32],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        q_int8: i8[128, 64] = stored("q.weight"),
        q_quant_bias: i32[128] = stored("qb"),
        q_deq_scale_with_k: f32[128] = mul(stored("ds"), per_query(div(reshape(reshape(rope_bound(stored("ks"), None, 16, 32, "half"), [64]), [2, 32]), head_power(reshape(reshape(rope_bound(stored("ks"), None, 16, 32, "half"), [64]), [2, 32]))), 2)),
        ds_power: f32[64] = reshape(head_power(reshape(reshape(rope_bound(stored("ks"), None, 16, 32, "half"), [64]), [2, 32])), [64]),
    ):
        linear: f16[1, T, 128] = kvc8.quant_linear(x8, q_int8, q_deq_scale_with_k, q_quant_bias, f16)
        reshape: f16[1, T, 4, 32] = aten.reshape(linear, [1, -1, 4, 32])
        transpose: f16[1, 4, T, 32] = aten.transpose.int(reshape, 1, 2)
        mul: f16[1, 4, T, 32] = aten.mul.Tensor(transpose, cos)
        slice_1: f16[1, 4, T, 16] = aten.slice.Tensor(transpose, 3, 0, 16)
        slice_2: f16[1, 4, T, 16] = aten.slice.Tensor(transpose, 3, 16, 9223372036854775807)
        neg: f16[1, 4, T, 16] = aten.neg(slice_2)
        cat: f16[1, 4, T, 32] = aten.cat([neg, slice_1], -1)
        mul_1: f16[1, 4, T, 32] = aten.mul.Tensor(cat, sin)
        add: f16[1, 4, T, 32] = aten.add.Tensor(mul, mul_1)
        transpose_1: f16[1, T, 4, 32] = aten.transpose.int(add, 1, 2)
        q: f16[T, 4, 32] = aten.reshape(transpose_1, [-1, 4, 32])
        flatten: i8[N, S, 64] = aten.flatten.using_ints(k_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds_power, offset=None, dst_dtype=5)
        k: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(q, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        return [attention_0]

Left alone where something else reads the dequantized keys. Soft caps and sinks do not matter: the
logits stay what they are.

Bound: real_exact. Each factor of a logit rounds once more, in the dtype that holds it: s/2^e times
a deq_scale in float32 (19 bits where that is packed), times a float weight or the query in the
dtype of the model. A channel whose scale is less than 2^-10 of the head's largest loses bits to
float16's subnormals then; it adds less than 2^-10 of what the largest may to a logit.
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
)
from kvc8.ir.types import TensorType, dtype_name
from kvc8.passes.matchers.attention import dequantizer
from kvc8.passes.matchers.rope import MOVES, Rope, behind, find_rope
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
# What may lie between q_proj and the attention: moves, and RoPE, which all keep a common factor.
ROTATION = (
    *(ATEN.mul.Tensor, ATEN.add.Tensor, ATEN.neg.default),
    *(ATEN.cat.default, ATEN.slice.Tensor, ATEN.stack.default),
)
SAME_VALUES = ("reshape", "cast", "round_up", "shard")  # of channels in their order


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def fold_k_scale(program: Program, weights: bool = True) -> Iterator[Remark]:
    """See the module. Without `weights` a float q_proj stays: another phase uses it as it is."""
    for attention in program.calls(ops.paged_attention):
        k = argument(attention, 1)
        back = dequantizer(k)
        if back is None:
            yield miss(attention, "its K is float")
            continue
        if len(back.users) > 1 or len(k.users) > 1:
            yield miss(attention, "its dequantized K is read elsewhere")
            continue
        heads, dim = (int(d) for d in tensor_type(k).shape[2:])
        scale = argument(back, 1)
        by_head = Expression("reshape", (expression_of(scale), (heads, dim)))
        power = Expression("head_power", (by_head,))
        groups = int(tensor_type(attention).shape[1]) // heads
        factor = Expression("per_query", (Expression("div", (by_head, power)), groups))
        yield hit(
            attention, f"into {_fold(program, attention, expression_of(scale), factor, weights)}"
        )
        flat = Expression("reshape", (power, (heads * dim,)))
        new = program.placeholder(f"{scale.name}_power", tensor_type(scale), flat)
        back.args = (argument(back, 0), new)


def _fold(
    program: Program, attention: Node, scale: Expression, factor: Expression, weights: bool
) -> str:
    """Multiply the query by a factor a channel, [Hq*D]; says where."""
    rows = argument(attention, 0)
    rope = find_rope(rows)
    source = behind(rope.source if rope else rows)
    alone = _feeds_only(source, attention)
    in_order = _in_order(rows) and (rope is None or _in_order(rope.source))
    if alone and in_order and (rope is None or _tied(scale, rope)) and _by_head(source, rows):
        if is_call(source, ops.quant_linear):
            return _into_deq_scale(program, source, factor)
        if is_call(source, ATEN.linear.default) and is_parameter(argument(source, 1)) and weights:
            return _into_weight(program, source, factor)
    if alone and _uniform(scale) and (gamma := _gamma(source, rows)) is not None:
        return _into_norm(program, source, gamma, factor)
    return _into_query(program, attention, factor)


def _feeds_only(source: Node, attention: Node) -> bool:
    """Whether nothing but an attention's query is made of a value."""
    waiting = [source]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user is attention:
                continue
            if not is_call(user, *MOVES, *ROTATION):
                return False
            waiting.append(user)
    return True


def _in_order(node: Node) -> bool:
    """Whether the moves behind a value leave the channels of a head, its last dimension, alone."""
    dim = tensor_type(node).shape[-1]
    while is_call(node, *MOVES):
        if tensor_type(node).shape[-1] != dim:
            return False
        node = argument(node, 0)
    return True


def _by_head(source: Node, rows: Node) -> bool:
    """Whether the outputs of a linear are the channels of each head in turn."""
    shape = tensor_type(rows).shape[1:]
    found = [user for user in source.users if is_call(user, ATEN.reshape.default)]
    return len(source.users) == 1 == len(found) and tensor_type(found[0]).shape[-2:] == shape


def _tied(scale: Expression, rope: Rope) -> bool:
    """Whether both channels of each RoPE pair have one scale, as far as its expression tells."""
    if scale.op == "rope_bound":
        return scale.args[2:5] == (rope.distance, rope.width, rope.kind)
    inner = scale.args[0] if scale.op in SAME_VALUES else None
    return _uniform(scale) or (isinstance(inner, Expression) and _tied(inner, rope))


def _uniform(scale: Expression) -> bool:
    """Whether all channels have one scale, as far as its expression tells."""
    if scale.op == "expand":
        x = scale.args[0]
        return isinstance(x, Expression) and x.op == "reshape" and set(x.args[1]) == {1}  # type: ignore[arg-type]
    inner = scale.args[0] if scale.op in SAME_VALUES else None
    return isinstance(inner, Expression) and _uniform(inner)


def _gamma(source: Node, rows: Node) -> Node | None:
    """The weight [D] of the norm that gives the query, where its last step multiplies by it."""
    if not is_call(source, ATEN.mul.Tensor):
        return None
    dim = tensor_type(rows).shape[2:]
    found = [x for x in source.all_input_nodes if is_parameter(x) and tensor_type(x).shape == dim]
    return found[0] if len(found) == 1 and len(found[0].users) == 1 else None


def _times(program: Program, old: Node, factor: Expression) -> Node:
    """A parameter times a factor in float32, in the dtype of the parameter."""
    type_ = tensor_type(old)
    expression = cast(
        Expression("mul", (cast(expression_of(old), torch.float32), factor)), type_.dtype
    )
    return program.placeholder(f"{old.name}_with_k", type_, expression)


def _into_deq_scale(program: Program, linear: Node, factor: Expression) -> str:
    deq_scale = argument(linear, 2)
    expression = Expression("mul", (expression_of(deq_scale), factor))
    name = f"{deq_scale.name}_with_k"
    linear.update_arg(2, program.placeholder(name, tensor_type(deq_scale), expression))
    return "q_proj's deq_scale"


def _into_weight(program: Program, linear: Node, factor: Expression) -> str:
    x, weight, *bias = linear.args
    assert isinstance(weight, Node)
    rows = int(tensor_type(weight).shape[0])
    parts = [_times(program, weight, Expression("reshape", (factor, (rows, 1))))]
    parts += [_times(program, b, factor) for b in bias if isinstance(b, Node)]
    linear.args = (x, *parts)
    return "q_proj's weight"


def _into_norm(program: Program, norm: Node, gamma: Node, factor: Expression) -> str:
    one_head = Expression("slice", (factor, 0, 0, int(tensor_type(gamma).shape[0])))
    norm.replace_input_with(gamma, _times(program, gamma, one_head))
    return "q_norm's weight"


def _into_query(program: Program, attention: Node, factor: Expression) -> str:
    rows = argument(attention, 0)
    _, heads, dim = tensor_type(rows).shape
    type_ = TensorType(tensor_type(rows).dtype, (heads, dim))
    shaped = Expression("reshape", (factor, (int(heads), int(dim))))
    name = f"{attention.name}_k_factor_{dtype_name(type_.dtype)}"
    node = program.placeholder(name, type_, cast(shaped, type_.dtype))
    new = program.call(attention, ATEN.mul.Tensor, rows, node)
    attention.update_arg(0, new)
    return "the query, by a multiplication"
