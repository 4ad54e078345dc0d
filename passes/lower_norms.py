"""Compute RMSNorms by npu_rms_norm, which does in one launch what ATen does in seven.

before:
    def lowering(x: f16[1, T, 64], w: f16[64] = stored("w")):
        to: f32[1, T, 64] = aten.to.dtype(x, f32)
        pow_1: f32[1, T, 64] = aten.pow.Tensor_Scalar(to, 2)
        mean: f32[1, T, 1] = aten.mean.dim(pow_1, [-1], True)
        add: f32[1, T, 1] = aten.add.Tensor(mean, 1e-05)
        rsqrt: f32[1, T, 1] = aten.rsqrt(add)
        mul: f32[1, T, 64] = aten.mul.Tensor(to, rsqrt)
        to_1: f16[1, T, 64] = aten.to.dtype(mul, f16)
        mul_1: f16[1, T, 64] = aten.mul.Tensor(w, to_1)
        return [mul_1]

after:
    def lowering(x: f16[1, T, 64], w: f16[64] = stored("w")):
        npu_rms_norm: (f16[1, T, 64], f32[1, T, 1]) = npu.npu_rms_norm(x, w, 1e-05)
        getitem: f16[1, T, 64] = npu_rms_norm[0]
        return [getitem]

In float32 the result is the same, bit for bit. In half precision ATen rounds before it multiplies by
the weight and after it, and the op once, after it.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, argument, is_call, is_parameter, tensor_type
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_norms(program: Program) -> Iterator[Remark]:
    """See the module."""
    for rsqrt in program.calls(ATEN.rsqrt.default):
        square = _mean_square(rsqrt)
        if square is None:
            yield miss(rsqrt, "it is not of the mean square along the last dimension")
            continue
        wide, epsilon = square
        product, gamma = _weighted(rsqrt, wide)
        if product is None or gamma is None:
            yield miss(rsqrt, "the norm is not multiplied by a stored weight of its width")
            continue
        x = argument(wide, 0) if is_call(wide, ATEN.to.dtype) else wide
        if tensor_type(x) != tensor_type(product):
            yield miss(rsqrt, f"it takes {tensor_type(x)} and gives {tensor_type(product)}")
            continue
        both = program.call(product, npu.npu_rms_norm, x, gamma, epsilon)
        product.replace_all_uses_with(program.call(product, getitem, both, 0))
        yield hit(both)


def _mean_square(rsqrt: Node) -> tuple[Node, float] | None:
    """What rsqrt(mean(x*x, -1) + epsilon) is of, and epsilon."""
    add = argument(rsqrt, 0)
    if not is_call(add, ATEN.add.Tensor) or not isinstance(add.args[1], float):
        return None
    mean = argument(add, 0)
    if not is_call(mean, ATEN.mean.dim) or list(mean.args[1:]) != [[-1], True]:
        return None
    power = argument(mean, 0)
    if not is_call(power, ATEN.pow.Tensor_Scalar) or power.args[1] != 2:
        return None
    return argument(power, 0), add.args[1]


def _weighted(rsqrt: Node, wide: Node) -> tuple[Node | None, Node | None]:
    """The product of the normalized value and a weight, and that weight."""
    scaled = _only_user(rsqrt)
    if scaled is None or not is_call(scaled, ATEN.mul.Tensor) or wide not in scaled.args:
        return None, None
    narrow = _only_user(scaled)
    narrow, product = (
        (narrow, _only_user(narrow))
        if narrow is not None and is_call(narrow, ATEN.to.dtype)
        else (scaled, narrow)
    )
    if product is None or not is_call(product, ATEN.mul.Tensor):
        return None, None
    [gamma] = [arg for arg in product.args if arg is not narrow] or [None]
    if not isinstance(gamma, Node) or not is_parameter(gamma):
        return None, None
    return product, gamma if tensor_type(gamma).shape == tensor_type(wide).shape[-1:] else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
