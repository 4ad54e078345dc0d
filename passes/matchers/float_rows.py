"""How far a fresh prompt that attends to its own float rows is from what its cache gives back.

With g the most that quantizing K moves a logit, scale*sum|q dk|, a weight moves by a factor of at
most e^(2g), and the result by at most max|dv| + (e^(2g) - 1)max|v|. Sinks change nothing of that:
their logits do not move, and what the values are weighted by is then less than one in all.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import npu, ops
from kvc8.ir.program import argument, is_call, unshaped
from kvc8.passes.matchers.attention import CacheSide, find_side


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far the attention of a fresh prompt may move where it sees float rows: see the module."""
    if not is_call(old, ops.paged_attention):
        return torch.zeros(())
    sides = [find_side(argument(old, i)) for i in (1, 2)]
    attention = new
    while not is_call(attention, npu.npu_fused_infer_attention_score):
        attention = argument(attention, 0)
    k, v = sides
    if k is None or v is None or unshaped(argument(attention, 1)).name != unshaped(k.rows).name:
        return torch.zeros(())
    q, scale = look(argument(old, 0)), old.args[6]
    assert isinstance(scale, float)
    rows, moved = zip(*(_moved(old, i, side, look) for i, side in ((1, k), (2, v))), strict=True)
    groups = q.shape[1] // rows[0].shape[1]
    dk, dv, seen = (x.repeat_interleave(groups, 1) for x in (moved[0], moved[1], rows[1].abs()))
    logit = scale * torch.einsum("qhd,khd->qhk", q.abs(), dk).amax(2, keepdim=True)
    most: Tensor = dv.amax(0) + torch.expm1(2 * logit) * seen.amax(0)
    return most


def _moved(
    attention: Node, index: int, side: CacheSide, look: Callable[[Node], Tensor]
) -> tuple[Tensor, Tensor]:
    """What a cache gives back of the new rows, [T, H, D], and how far it is from them."""
    slots = look(argument(side.write, 2)).long()
    back = look(argument(attention, index)).flatten(0, 1)[slots]
    return back, (back - look(side.rows)).abs()
