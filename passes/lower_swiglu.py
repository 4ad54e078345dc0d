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

import torch

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, is_call
from kvc8.passes.matchers.gates import halves
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
OTHERS = (ATEN.relu.default, ATEN.sigmoid.default)


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_swiglu(program: Program) -> Iterator[Remark]:
    """See the module."""
    for activation in program.calls(ATEN.silu.default, *OTHERS):
        if not is_call(activation, ATEN.silu.default):
            yield miss(activation, f"npu_swiglu computes silu, and this is {activation.target}")
            continue
        packed = halves(activation)
        if packed is None:
            yield miss(activation, "it is not of the first half of a linear, times the second")
            continue
        [product] = activation.users
        new = program.call(product, npu.npu_swiglu, packed, -1)
        product.replace_all_uses_with(new)
        yield hit(new)
