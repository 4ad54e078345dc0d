"""Attention sinks beside an attention op that has none.

A sink s is one more logit of a head, which carries no value: the weights are e^l / (sum e^l + e^s).
An op that divides by sum e^l, and says its logarithm L, is off by a factor of one row and head,

    sum e^l / (sum e^l + e^s) = 1 / (1 + e^(s - L)) = sigmoid(L - s)

which is exact in real numbers. (npu_fused_infer_attention_score_v2 takes sinks itself, but of float
K and V in bfloat16 only: op-plugin npu_fused_infer_attention_score_v2.md, on learnable_sink.)
"""

import torch
from torch.fx import Node

from kvc8.ir.expression import Expression
from kvc8.ir.program import expression_of, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.attention import AttentionSite, in_dtype

ATEN = torch.ops.aten


def beside_sinks(site: AttentionSite, rows: Node, lse: Node) -> Node:
    """Rows [T, heads, dim] as they are with the sinks of a site; `lse` is the op's second result.

    That is float32 [T, heads, 1], or [B, heads, S, 1] of B sequences.
    """
    dtype, sinks = tensor_type(rows).dtype, site.sinks
    assert sinks is not None
    if len(tensor_type(lse).shape) == 4:
        lse = site.call(ATEN.transpose.int, lse, 1, 2)
        lse = site.call(ATEN.reshape.default, lse, [-1, *_heads(sinks)])
    share = site.call(ATEN.sigmoid.default, site.call(ATEN.sub.Tensor, lse, _column(site, sinks)))
    seen = site.call(ATEN.mul.Tensor, rows, share)  # in float32, which both are taken in
    return site.call(ATEN.to.dtype, seen, dtype) if dtype is not torch.float32 else seen


def _heads(sinks: Node) -> tuple[int, int]:
    return int(tensor_type(sinks).shape[0]), 1


def _column(site: AttentionSite, sinks: Node) -> Node:
    """The sinks as float32 [heads, 1], reshaped at load time."""
    wide = in_dtype(site.program, sinks, torch.float32)
    column = Expression("reshape", (expression_of(wide), _heads(sinks)))
    type_ = TensorType(torch.float32, _heads(sinks))
    return site.program.placeholder(f"{sinks.name}_column", type_, column)
