"""A program in double precision: the same calls on the same codes, with rounding out of the way.

Two correct forms of a quantized program part in single precision: a sum in another order moves a
value by one part in 10^7, now and then over the middle between two codes, and each quantizer after
that amplifies the step. In double precision a value would have to lie within one part in 10^15 of
such a middle. Forms that mean the same therefore give the same codes there, and their logits agree
to many digits; what still differs is a fault.

What quantizes and dequantizes stays as it is, float32 scales and float32 arithmetic: that is part
of what those ops are. The values that go in are rounded to float32 in both forms alike.
"""

import torch
from torch.fx import Node

from kvc8.ir import mixture_ops, ops, rank_ops
from kvc8.ir.expression import cast
from kvc8.ir.program import Program, expression_of, is_call, is_parameter, type_of
from kvc8.ir.token_cache import is_steps
from kvc8.ir.types import TensorType

F64 = torch.float64
INTEGER_LINEARS = (ops.quant_linear, ops.dynamic_linear, mixture_ops.dynamic_grouped_linear)


def widen(program: Program) -> Program:
    """Another program of the same calls, in which every float value is float64.

    Takes a CAPTURED or QUANTIZED program. Raises IRError where an op has no such form.
    """
    wide = program.copy()
    for node in wide.graph.nodes:
        if node.op == "placeholder":
            _widen_placeholder(node)
        elif node.op == "call_function":
            node.args = tuple(map(_wider, node.args))
            node.kwargs = {name: _wider(arg) for name, arg in node.kwargs.items()}
            node.meta["type"] = wide.infer(node)
    return wide


def _widen_placeholder(node: Node) -> None:
    type_ = type_of(node)
    if not isinstance(type_, TensorType) or not type_.dtype.is_floating_point:
        return
    if node.users and all(_takes_scale(user, node) for user in node.users):
        return
    node.meta["type"] = TensorType(F64, type_.shape)
    if is_parameter(node):
        node.meta["expression"] = cast(expression_of(node), F64)


def _takes_scale(user: Node, node: Node) -> bool:
    if is_call(user, ops.quantize, ops.dequantize):
        return node in user.args[1:3]
    if is_steps(node):
        return True
    return is_call(user, *INTEGER_LINEARS, rank_ops.dequant_sum)


def _wider(arg: object) -> object:
    if isinstance(arg, tuple | list):
        return type(arg)(map(_wider, arg))
    return F64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg
