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

Heads that were put before tokens, [1, H, T, D], are normalized as they lie, [1, T, H, D], and put
first afterwards, where lower_rope takes both ways back (Gemma 3).

Gemma multiplies by 1 + w, in float32; the op's weight is that sum, made when the model is loaded.

In float32 the result is the same, bit for bit. In half precision ATen rounds before it multiplies by
the weight and after it, and the op once, after it; of 1 + w the sum is rounded instead, since the op
takes its weight in the dtype of its input.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.expression import Expression, cast, values
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    expression_of,
    is_call,
    is_parameter,
    tensor_type,
)
from kvc8.ir.types import TensorType
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
        x = argument(wide, 0) if is_call(wide, ATEN.to.dtype) else wide
        product, gamma = _weighted(rsqrt, wide)
        if product is None or gamma is None:
            product, gamma = _weighted_by_sum(program, rsqrt, wide, tensor_type(x).dtype)
        if product is None or gamma is None:
            yield miss(rsqrt, "the norm is not multiplied by a stored weight of its width")
            continue
        if tensor_type(x) != tensor_type(product):
            yield miss(rsqrt, f"it takes {tensor_type(x)} and gives {tensor_type(product)}")
            continue
        turned = is_call(x, ATEN.transpose.int) and set(x.args[1:]) == {1, 2}
        rows = argument(x, 0) if turned and len(tensor_type(x).shape) == 4 else x
        both = program.call(product, npu.npu_rms_norm, rows, gamma, epsilon)
        out = program.call(product, getitem, both, 0)
        if rows is not x:
            out = program.call(product, ATEN.transpose.int, out, 1, 2)
        product.replace_all_uses_with(out)
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


def _weighted_by_sum(
    program: Program, rsqrt: Node, wide: Node, dtype: torch.dtype
) -> tuple[Node | None, Node | None]:
    """The same of x * (c + w), all in float32 and then cast: that cast, and c + w."""
    scaled = _only_user(rsqrt)
    product = _only_user(scaled) if scaled is not None and wide in scaled.args else None
    if product is None or not is_call(product, ATEN.mul.Tensor):
        return None, None
    [total] = [arg for arg in product.args if arg is not scaled] or [None]
    if not is_call(total, ATEN.add.Tensor) or not isinstance(total, Node):
        return None, None
    stored, plus = argument(total, 0), total.args[1]
    if is_call(stored, ATEN.to.dtype):
        stored = argument(stored, 0)
    of_width = tensor_type(total).shape == tensor_type(wide).shape[-1:]
    if not isinstance(plus, int | float) or not is_parameter(stored) or not of_width:
        return None, None
    narrow = _only_user(product)
    last = narrow if is_call(narrow, ATEN.to.dtype, ATEN.type_as.default) else product
    return last, _sum(program, stored, float(plus), dtype)


def _sum(program: Program, stored: Node, plus: float, dtype: torch.dtype) -> Node:
    """A parameter that is another one plus a number, summed in float32."""
    number = values(torch.tensor([plus], dtype=torch.float32))
    total = Expression("add", (cast(expression_of(stored), torch.float32), number))
    type_ = TensorType(dtype, tensor_type(stored).shape)
    return program.placeholder(f"{stored.name}_gamma", type_, cast(total, dtype))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
