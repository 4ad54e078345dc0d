"""Sum and gather over ranks by torch's functional collectives: gloo on a CPU, HCCL on a device.

The group of all ranks is called "tp"; whoever runs a program gives it that name.

before:
    def lowering(x: i32[1, T, 64], y: f16[1, R, 128]):
        all_reduce: i32[1, T, 64] = kvc8.all_reduce(x, 2)
        all_gather: f16[1, R, 256] = kvc8.all_gather(y, 2)
        return [all_reduce, all_gather]

after:
    def lowering(x: i32[1, T, 64], y: f16[1, R, 128]):
        all_reduce_1: i32[1, T, 64] = _c10d_functional.all_reduce(x, 'sum', 'tp')
        wait_tensor: i32[1, T, 64] = _c10d_functional.wait_tensor(all_reduce_1)
        all_gather_into_tensor: f16[2, R, 128] = _c10d_functional.all_gather_into_tensor(y, 2, 'tp')
        wait_tensor_1: f16[2, R, 128] = _c10d_functional.wait_tensor(all_gather_into_tensor)
        transpose: f16[R, 2, 128] = aten.transpose.int(wait_tensor_1, 0, 1)
        reshape: f16[1, R, 256] = aten.reshape(transpose, [1, -1, 256])
        return [wait_tensor, reshape]

Bound: real_exact. Whole numbers have one sum, in any order; floats may be summed in an order of the
group's own, and rounded at each step.
"""

from collections.abc import Iterator

import torch

from kvc8.ir import rank_ops
from kvc8.ir.program import Program, Stage, tensor_type
from kvc8.passes.rewrite import Contract, Remark, hit, rewrite

ATEN, C10D = torch.ops.aten, torch.ops._c10d_functional
GROUP = "tp"


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_collectives(program: Program) -> Iterator[Remark]:
    """See the module."""
    for total in program.calls(rank_ops.all_reduce):
        begun = program.call(total, C10D.all_reduce.default, total.args[0], "sum", GROUP)
        done = program.call(total, C10D.wait_tensor.default, begun)
        total.replace_all_uses_with(done)
        whole = not tensor_type(total).dtype.is_floating_point
        contract: Contract = "bit_exact" if whole else "real_exact"
        yield hit(done, contract=contract)
    for gathered in program.calls(rank_ops.all_gather):
        x, ranks = gathered.args
        begun = program.call(gathered, C10D.all_gather_into_tensor.default, x, ranks, GROUP)
        done = program.call(gathered, C10D.wait_tensor.default, begun)
        rows = program.call(gathered, ATEN.transpose.int, done, 0, 1)  # [ranks, T, n] as it comes
        shape = [1, -1, tensor_type(gathered).shape[-1]]
        joined = program.call(gathered, ATEN.reshape.default, rows, shape)
        gathered.replace_all_uses_with(joined)
        yield hit(joined, contract="bit_exact")
