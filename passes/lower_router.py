"""Choose a mixture's experts by npu_moe_gating_top_k_softmax or npu_moe_gating_top_k.

Logits go in as float32, in which the model computes them, so that the op rounds nothing before it
chooses. Of equal experts the op takes the lower one, and aten.topk any.

before:
    def lowering(x: f16[T, 8]):
        softmax: f32[T, 8] = aten.softmax.int(x, -1, f32)
        topk: (f32[T, 2], i64[T, 2]) = aten.topk(softmax, 2)
        getitem: f32[T, 2] = topk[0]
        getitem_1: i64[T, 2] = topk[1]
        return [getitem, getitem_1]

after:
    def lowering(x: f16[T, 8]):
        to: f32[T, 8] = aten.to.dtype(x, f32)
        npu_moe_gating_top_k_softmax: (f32[T, 2], i32[T, 2], i32[T, 2]) = npu.npu_moe_gating_top_k_softmax(to, None, 2)
        getitem_2: f32[T, 2] = npu_moe_gating_top_k_softmax[0]
        getitem_3: i32[T, 2] = npu_moe_gating_top_k_softmax[1]
        to_1: i64[T, 2] = aten.to.dtype(getitem_3, i64)
        return [getitem_2, to_1]

A router of another kind is left to ATen, whose ops a device runs one by one. Of groups the op knows
those that transformers' models have: judged by the sum of their two best experts, and of more than
two experts each.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, argument, is_call, tensor_type
from kvc8.passes.matchers.router import Router, find_router
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
MOST_EXPERTS, FEWEST_OF_A_GROUP = 2048, 3


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_router(program: Program) -> Iterator[Remark]:
    """See the module."""
    for topk in program.calls(ATEN.topk.default):
        if not _chooses(topk):
            continue
        router = find_router(topk)
        if router is None:
            yield miss(topk, "it chooses otherwise than by softmax, or by sigmoid over their sum")
            continue
        count, each = _sizes(router)
        if count > MOST_EXPERTS or each < FEWEST_OF_A_GROUP <= count:
            yield miss(topk, f"its groups have {each} of {count} experts")
            continue
        weights, experts = _gating(program, topk, router)
        router.weights.replace_all_uses_with(weights)
        wide = program.call(topk, ATEN.to.dtype, experts, torch.int64)
        router.experts.replace_all_uses_with(wide)
        yield hit(weights)


def _chooses(topk: Node) -> bool:
    """Whether a call chooses experts of a token, and not groups of them."""
    users = [user for item in topk.users if item.args[1] == 1 for user in item.users]
    groups = any(is_call(user, ATEN.scatter.value) for user in users)
    return len(tensor_type(argument(topk, 0)).shape) == 2 and not groups


def _sizes(router: Router) -> tuple[int, int]:
    """How many experts there are, and in each group."""
    count = int(tensor_type(router.logits).shape[-1])
    return count, count // router.group_count


def _gating(program: Program, topk: Node, router: Router) -> tuple[Node, Node]:
    """The op's weights and experts, int32."""
    logits, f32 = router.logits, torch.float32
    if tensor_type(logits).dtype is not f32:
        logits = program.call(topk, ATEN.to.dtype, logits, f32)
    if not router.sigmoid:
        found = program.call(topk, npu.npu_moe_gating_top_k_softmax, logits, None, router.k)
    else:
        options = {
            "bias": router.bias,
            "k_group": router.k_group,
            "group_count": router.group_count,
            "group_select_mode": int(router.group_count > 1),
            "norm_type": 1,
            "routed_scaling_factor": router.factor,
            "eps": router.eps,
        }
        found = program.call(topk, npu.npu_moe_gating_top_k, logits, router.k, kwargs=options)
    return program.call(topk, getitem, found, 0), program.call(topk, getitem, found, 1)
