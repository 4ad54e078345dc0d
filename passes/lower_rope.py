"""Rotate by npu_rotary_mul: RoPE of halves is one launch where ATen takes seven.

before:
    def lowering(q: f16[1, T, 4, 8], c: f16[1, T, 8], s: f16[1, T, 8]):
        transpose: f16[1, 4, T, 8] = aten.transpose.int(q, 1, 2)
        unsqueeze: f16[1, 1, T, 8] = aten.unsqueeze(c, 1)
        unsqueeze_1: f16[1, 1, T, 8] = aten.unsqueeze(s, 1)
        mul: f16[1, 4, T, 8] = aten.mul.Tensor(transpose, unsqueeze)
        slice_1: f16[1, 4, T, 4] = aten.slice.Tensor(transpose, 3, 0, 4)
        slice_2: f16[1, 4, T, 4] = aten.slice.Tensor(transpose, 3, 4, 9223372036854775807)
        neg: f16[1, 4, T, 4] = aten.neg(slice_2)
        cat: f16[1, 4, T, 8] = aten.cat([neg, slice_1], -1)
        mul_1: f16[1, 4, T, 8] = aten.mul.Tensor(cat, unsqueeze_1)
        add: f16[1, 4, T, 8] = aten.add.Tensor(mul, mul_1)
        transpose_1: f16[1, T, 4, 8] = aten.transpose.int(add, 1, 2)
        return [transpose_1]

after:
    def lowering(q: f16[1, T, 4, 8], c: f16[1, T, 8], s: f16[1, T, 8]):
        unsqueeze_2: f16[1, T, 1, 8] = aten.unsqueeze(c, 2)
        unsqueeze_3: f16[1, T, 1, 8] = aten.unsqueeze(s, 2)
        npu_rotary_mul: f16[1, T, 4, 8] = npu.npu_rotary_mul(q, unsqueeze_2, unsqueeze_3)
        return [npu_rotary_mul]

float16 computes in the same steps and float32 too: the same, bit for bit. bfloat16 is computed in
float32 and rounded once, where ATen rounds each product and the sum.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, argument, is_call, tensor_type
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
Angles = tuple[Node, Node, Node]  # the sum x*cos + turned*sin, and cos and sin as [1, T, D]


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_rope(program: Program) -> Iterator[Remark]:
    """See the module."""
    shared: dict[Node, Node] = {}
    for turned in program.calls(ATEN.cat.default, ATEN.stack.default):
        parts = turned.args[0]
        if not isinstance(parts, list | tuple) or not is_call(parts[0], ATEN.neg.default):
            continue
        x = _halves(turned)
        found = _rotation(turned, x) if x else None
        if x is None or found is None:
            yield miss(turned, "it is not x*cos + (-x[D/2:], x[:D/2])*sin for all heads alike")
            continue
        total, cos, sin = found
        rows, heads_first = (argument(x, 0), True) if _is_swap(x) else (x, False)
        angles = [_angle(program, shared, a, heads_first=heads_first) for a in (cos, sin)]
        out = program.call(total, npu.npu_rotary_mul, rows, *angles)
        _replace(program, total, out, swapped=heads_first)
        yield hit(out)


def _halves(turned: Node) -> Node | None:
    """The x that (-x[D/2:], x[:D/2]) is made of."""
    parts = turned.args[0]
    if not is_call(turned, ATEN.cat.default) or not isinstance(parts, list | tuple):
        return None
    if len(parts) != 2 or not isinstance(parts[0], Node) or not isinstance(parts[1], Node):
        return None
    high, low = argument(parts[0], 0), parts[1]
    if not is_call(high, ATEN.slice.Tensor) or not is_call(low, ATEN.slice.Tensor):
        return None
    x = argument(low, 0)
    last, half = len(tensor_type(x).shape) - 1, int(tensor_type(low).shape[-1])
    width = int(tensor_type(x).shape[-1])
    ends = [(last, half), (last, 0, half)]
    same = [high.args[1:3], low.args[1:4]] == ends and argument(high, 0) is x
    return x if same and width == 2 * half and turned.args[1] in (-1, last) else None


def _rotation(turned: Node, x: Node) -> Angles | None:
    """The sum that a turned x goes into, where cosines and sines are [1, 1, T, D]."""
    by_sin = _only_user(turned, ATEN.mul.Tensor)
    total = _only_user(by_sin, ATEN.add.Tensor) if by_sin else None
    if by_sin is None or total is None:
        return None
    by_cos = argument(total, 0) if total.args[1] is by_sin else argument(total, 1)
    if not is_call(by_cos, ATEN.mul.Tensor) or x not in by_cos.args:
        return None
    angles = [_other(by_cos, x), _other(by_sin, turned)]
    if not all(is_call(angle, ATEN.unsqueeze.default) and angle.args[1] == 1 for angle in angles):
        return None
    cos, sin = (argument(angle, 0) for angle in angles)
    rotated, dtype = tensor_type(x).shape[-1], tensor_type(x).dtype
    fits = all(
        tensor_type(a).shape[-1] == rotated and tensor_type(a).dtype is dtype for a in (cos, sin)
    )
    return (total, cos, sin) if fits else None


def _only_user(node: Node, op: torch._ops.OpOverload) -> Node | None:
    [user] = node.users if len(node.users) == 1 else [None]
    return user if user is not None and is_call(user, op) else None


def _other(product: Node, factor: Node) -> Node:
    return argument(product, 1) if product.args[0] is factor else argument(product, 0)


def _is_swap(x: Node) -> bool:
    """Whether x is [1, heads, T, D] of a [1, T, heads, D], or back."""
    return is_call(x, ATEN.transpose.int) and set(x.args[1:]) == {1, 2}


def _angle(program: Program, shared: dict[Node, Node], angle: Node, *, heads_first: bool) -> Node:
    """Cosines or sines of all tokens, [1, T, 1, D], once for all layers; [1, 1, T, D] else."""
    if not heads_first:
        return program.call(angle.next, ATEN.unsqueeze.default, angle, 1)
    if angle not in shared:
        shared[angle] = program.call(angle.next, ATEN.unsqueeze.default, angle, 2)
        shared[angle].meta["origin"] = angle.meta.get("origin", "")
    return shared[angle]


def _replace(program: Program, total: Node, out: Node, *, swapped: bool) -> None:
    if not swapped:
        total.replace_all_uses_with(out)
        return
    for user in [user for user in total.users if _is_swap(user)]:
        user.replace_all_uses_with(out)
        program.graph.erase_node(user)
    if total.users:
        back = program.call(total, ATEN.transpose.int, out, 1, 2)
        total.replace_all_uses_with(back)
