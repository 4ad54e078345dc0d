"""Remove calls that give what they were given: transposes that undo each other, factors of one.

before:
    def captured(x: f16[1, T, 2, 8]):
        transpose: f16[1, 2, T, 8] = aten.transpose.int(x, 1, 2)
        mul: f16[1, 2, T, 8] = aten.mul.Tensor(transpose, 1.0)
        transpose_1: f16[1, T, 2, 8] = aten.transpose.int(mul, 1, 2)
        neg: f16[1, T, 2, 8] = aten.neg(transpose_1)
        return [neg]

after:
    def captured(x: f16[1, T, 2, 8]):
        neg: f16[1, T, 2, 8] = aten.neg(x)
        return [neg]

A transpose of something else is left alone, as is a factor that is not exactly one; neither is
worth a remark, for nearly every call is such a site.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir.program import Program, Stage, argument, is_call, type_of
from kvc8.passes.rewrite import Remark, hit, rewrite

TRANSPOSE, MUL = torch.ops.aten.transpose.int, torch.ops.aten.mul.Tensor


@rewrite(takes=Stage.CAPTURED, gives=Stage.CAPTURED, contract="bit_exact")
def remove_identities(program: Program) -> Iterator[Remark]:
    """See the module."""
    for node in program.calls(TRANSPOSE, MUL):
        same = _undone(node) if node.target is TRANSPOSE else _unscaled(node)
        if same is not None:
            node.replace_all_uses_with(same)
            yield hit(node)


def _undone(node: Node) -> Node | None:
    inner = argument(node, 0)
    if is_call(inner, TRANSPOSE) and set(inner.args[1:]) == set(node.args[1:]):
        return argument(inner, 0)
    return None


def _unscaled(node: Node) -> Node | None:
    same = node.args[1] == 1.0 and type_of(argument(node, 0)) == type_of(node)
    return argument(node, 0) if same else None
