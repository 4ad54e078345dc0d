"""Compute gelu(gate) * up by npu_geglu, where one linear gives both.

before:
    def lowering(x: f16[1, T, 64]):
        split: (f16[1, T, 32], f16[1, T, 32]) = aten.split_with_sizes(x, [32, 32], -1)
        getitem: f16[1, T, 32] = split[0]
        getitem_1: f16[1, T, 32] = split[1]
        gelu: f16[1, T, 32] = aten.gelu(getitem, approximate='tanh')
        mul: f16[1, T, 32] = aten.mul.Tensor(gelu, getitem_1)
        return [mul]

after:
    def lowering(x: f16[1, T, 64]):
        npu_geglu: (f16[1, T, 32], f16[1, T, 32]) = npu.npu_geglu(x, -1, 1, True)
        getitem_2: f16[1, T, 32] = npu_geglu[0]
        return [getitem_2]

The op activates the second half unless told otherwise, where npu_swiglu always activates the first;
the gate comes first in a linear, so `activate_left` is True. It gives gelu(gate) beside the product,
for training. `npu_gelu_mul` gives the product alone, but takes at most 1024 columns.

In float32 the result is the same, bit for bit. In float16 op and ATen both round gelu and then the
product; in bfloat16 ATen rounds both, and the op once, at its end.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage
from kvc8.passes.matchers.gates import halves
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

GELU = torch.ops.aten.gelu.default
BY_ERF, BY_TANH = 0, 1  # npu_geglu's numbers for how gelu is computed


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_geglu(program: Program) -> Iterator[Remark]:
    """See the module."""
    for gelu in program.calls(GELU):
        packed = halves(gelu)
        if packed is None:
            yield miss(gelu, "it is not of the first half of a linear, times the second")
            continue
        [product] = gelu.users
        both = program.call(product, npu.npu_geglu, packed, -1, _approximate(gelu), True)
        product.replace_all_uses_with(program.call(product, getitem, both, 0))
        yield hit(both)


def _approximate(gelu: Node) -> int:
    """How the op should compute what a call of ATen's gelu does."""
    return BY_TANH if gelu.kwargs.get("approximate", "none") == "tanh" else BY_ERF
