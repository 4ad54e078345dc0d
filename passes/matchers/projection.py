"""What reads an attention: its output projection, as passes that fold V into it look for it."""

import torch
from torch.fx import Node

from kvc8.ir import ops, rank_ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import argument, expression_of, is_call, is_parameter, tensor_type, users
from kvc8.passes.matchers.attention import dequantizer

ATEN = torch.ops.aten
MOVES = (ATEN.reshape.default, ATEN.unsqueeze.default)


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
    consumers = [is_call(user, ops.quant_linear, rank_ops.int_linear) for user in users(reader)]
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
