"""Compute silu(gate) * up by npu_swiglu, where one linear gives both.

before:
    def lowering(x: f16[1, T, 64]):
        split: (f16[1, T, 32], f16[1, T, 32]) = aten.split_with_sizes(x, [32, 32], -1)
        getitem: f16[1, T, 32] = split[0]
        getitem_1: f16[1, T, 32] = split[1]
        silu: f16[1, T, 32] = aten.silu(getitem)
        mul: f16[1, T, 32] = aten.mul.Tensor(silu, getitem_1)
        return [mul]

after:
    def lowering(x: f16[1, T, 64]):
        npu_swiglu: f16[1, T, 32] = npu.npu_swiglu(x, -1)
        return [npu_swiglu]

In float32 the result is the same, bit for bit. In half precision ATen rounds silu and the product,
and the op once, at its end.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, argument, is_call, tensor_type
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
OTHERS = (ATEN.gelu.default, ATEN.relu.default, ATEN.sigmoid.default)


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_swiglu(program: Program) -> Iterator[Remark]:
    """See the module."""
    for activation in program.calls(ATEN.silu.default, *OTHERS):
        if not is_call(activation, ATEN.silu.default):
            yield miss(activation, f"npu_swiglu computes silu, and this is {activation.target}")
            continue
        packed = _halves(activation)
        if packed is None:
            yield miss(activation, "it is not of the first half of a linear, times the second")
            continue
        [product] = activation.users
        new = program.call(product, npu.npu_swiglu, packed, -1)
        product.replace_all_uses_with(new)
        yield hit(new)


def _halves(silu: Node) -> Node | None:
    """The value that gate and up are the halves of."""
    gate = argument(silu, 0)
    [product] = silu.users if len(silu.users) == 1 else [None]
    if product is None or not is_call(product, ATEN.mul.Tensor) or not is_call(gate, getitem):
        return None
    up = argument(product, 1) if product.args[0] is silu else argument(product, 0)
    parts = argument(gate, 0)
    if not is_call(up, getitem) or argument(up, 0) is not parts:
        return None
    if (gate.args[1], up.args[1]) != (0, 1):
        return None
    last = len(tensor_type(gate).shape) - 1
    if is_call(parts, ATEN.chunk.default):
        return argument(parts, 0) if parts.args[1:] in ((2, -1), (2, last)) else None
    if not is_call(parts, ATEN.split_with_sizes.default):
        return None
    sizes = parts.args[1]
    assert isinstance(sizes, list | tuple)
    even = len(sizes) == 2 and sizes[0] == sizes[1] and parts.args[2] in (-1, last)
    return argument(parts, 0) if even else None
