"""Find the routers of mixtures: how a token's experts are chosen, and how they are weighted.

Two families are known. Softmax: the largest of softmax(logits), weighted by themselves. Sigmoid:
the largest of sigmoid(logits) + bias, in some models within the best of several groups of experts,
weighted by sigmoid(logits) over their sum, times a constant.
"""

from dataclasses import dataclass
from math import inf
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir.program import argument, is_call, tensor_type

ATEN = torch.ops.aten
F32 = torch.float32


@dataclass(frozen=True)
class Router:
    """What a router reads and gives; of softmax only the first four."""

    logits: Node  # float32 [T, E]
    k: int
    experts: Node  # int64 [T, k]
    weights: Node  # float32 [T, k]
    sigmoid: bool = False
    bias: Node | None = None  # float32 [E]
    k_group: int = 1
    group_count: int = 1
    factor: float = 1.0
    eps: float = 0.0


def find_router(topk: Node) -> Router | None:
    """The router whose experts a call of aten.topk chooses; None where it is not known."""
    items: dict[object, Node] = {u.args[1]: u for u in topk.users if is_call(u, getitem)}
    if topk.args[2:4] not in ((), (-1,), (-1, True)):
        return None
    source = argument(topk, 0)
    if is_call(source, ATEN.softmax.int):
        return _softmax(topk, source, items)
    return _sigmoid(topk, source, items[1]) if set(items) == {1} else None


def _softmax(topk: Node, softmax: Node, items: dict[object, Node]) -> Router | None:
    logits, last = argument(softmax, 0), softmax.args[1] in (-1, 1)
    wide = tensor_type(softmax).dtype is F32 and set(items) == {0, 1} and len(softmax.users) == 1
    return Router(logits, _k(topk), items[1], items[0]) if last and wide else None


def _k(topk: Node) -> int:
    k = topk.args[1]
    assert isinstance(k, int)
    return k


def _sigmoid(topk: Node, source: Node, experts: Node) -> Router | None:
    groups = (1, 1)
    scores = source
    if is_call(source, ATEN.masked_fill.Scalar):
        found = _groups(source)
        if found is None:
            return None
        groups, scores = found, argument(source, 0)
    biased = is_call(scores, ATEN.add.Tensor)
    sigmoid = argument(scores, 0) if biased else scores
    bias = argument(scores, 1) if biased else None
    gathers = [u for u in experts.users if is_call(u, ATEN.gather.default)]
    if not is_call(sigmoid, ATEN.sigmoid.default) or len(gathers) != 1:
        return None
    if tuple(gathers[0].args) != (sigmoid, 1, experts) or tensor_type(sigmoid).dtype is not F32:
        return None
    if bias is not None and tensor_type(bias).dtype is not F32:
        return None
    normed = _normed(gathers[0])
    if normed is None:
        return None
    weights, eps, factor = normed
    logits = argument(sigmoid, 0)
    return Router(logits, _k(topk), experts, weights, True, bias, *groups, factor, eps)


def _normed(gather: Node) -> tuple[Node, float, float] | None:
    """What gives the gathered / (their sum + eps) * factor, eps and factor."""
    divided = [user for user in gather.users if is_call(user, ATEN.div.Tensor)]
    if len(divided) != 1 or len(gather.users) != 2 or divided[0].args[0] is not gather:
        return None
    [div], total = divided, argument(divided[0], 1)
    eps = 0.0
    if is_call(total, ATEN.add.Tensor) and isinstance(total.args[1], float):
        eps, total = total.args[1], argument(total, 0)
    summed = is_call(total, ATEN.sum.dim_IntList) and tuple(total.args) == (gather, [-1], True)
    if not summed:
        return None
    for user in div.users if len(div.users) == 1 else ():
        if is_call(user, ATEN.mul.Tensor) and isinstance(user.args[1], int | float):
            return user, eps, float(user.args[1])
    return div, eps, 1.0


def _groups(masked: Node) -> tuple[int, int] | None:
    """(groups that are kept, groups): scores of others are minus infinity.

    The best groups have the largest sums of their two largest scores.
    """
    scores, mask, fill = masked.args
    chain = (
        *(ATEN.bitwise_not.default, ATEN.to.dtype, ATEN.reshape.default),
        *(ATEN.expand.default, ATEN.unsqueeze.default),
    )
    node = mask
    for op in chain:
        if not is_call(node, op):
            return None
        node = argument(node, 0)  # type: ignore[arg-type]
    if fill != -inf or not is_call(node, ATEN.scatter.value) or node.args[1::2] != (1, 1):  # type: ignore[union-attr]
        return None
    assert isinstance(node, Node)
    chosen = argument(node, 2)
    best = argument(chosen, 0) if is_call(chosen, getitem) else chosen
    if not is_call(argument(node, 0), ATEN.zeros_like.default) or not is_call(
        best, ATEN.topk.default
    ):
        return None
    total = argument(best, 0)
    if not is_call(total, ATEN.sum.dim_IntList) or total.args[1] != [-1]:
        return None
    two = argument(argument(total, 0), 0)
    grouped = argument(two, 0)
    if not is_call(two, ATEN.topk.default) or two.args[1] != 2 or grouped.args[0] is not scores:
        return None
    return _k(best), int(tensor_type(grouped).shape[1])
