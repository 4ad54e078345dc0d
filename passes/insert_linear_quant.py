"""Compute W8A8 linears as the checkpoint means them: int8 by int8, exact, one product at the end.

before:
    def captured(
        x: f16[1, T, 64],
        w: f16[32, 64] = cast(w8a8(stored("w"), stored("is"), stored("io"), stored("ds"), stored("qb")), f16),
    ):
        linear: f16[1, T, 32] = aten.linear(x, w)
        return [linear]

after:
    def captured(
        x: f16[1, T, 64],
        w_input_scale: f32[1] = reshape(cast(stored("is"), f32), [1]),
        w_input_zero: f32[1] = reshape(cast(stored("io"), f32), [1]),
        w_int8: i8[32, 64] = stored("w"),
        w_deq_scale: f32[32] = stored("ds"),
        w_quant_bias: i32[32] = stored("qb"),
    ):
        quantize: i8[1, T, 64] = kvc8.quantize(x, w_input_scale, w_input_zero)
        linear_1: f16[1, T, 32] = kvc8.quant_linear(quantize, w_int8, w_deq_scale, w_quant_bias, f16)
        return [linear_1]

A linear whose weight is stored as float, or whose input has a scale a token, is left alone.

Bound: x = s*(q - z) + e with |e| <= s/2 where x is in range, and the sum over K is exact, so that
output o differs from the float linear by at most s/2 * sum_k |w[o, k]|, and by as much more as
clipping takes off x; then the result is rounded once to the dtype of x.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Arg, Expression, cast
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


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far each output may be from the float linear's: see the module."""
    if not is_call(new, ops.quant_linear):
        return torch.zeros(())
    x8, weight, deq_scale = (argument(new, i) for i in range(3))
    x, scale, zero = (look(argument(x8, i)) for i in range(3))
    clipped = x - x.clamp(scale * (-128 - zero), scale * (127 - zero))
    w = look(weight).double() * (look(deq_scale) / scale)[:, None]
    return (scale / 2 + clipped.abs()) @ w.abs().T


@rewrite(takes=Stage.CAPTURED, gives=Stage.CAPTURED, contract="quantizing", bound=bound)
def insert_linear_quant(program: Program) -> Iterator[Remark]:
    """See the module."""
    for linear in program.calls(torch.ops.aten.linear.default):
        parts = _w8a8(argument(linear, 1))
        if parts is None:
            yield miss(linear, _why_not(argument(linear, 1)))
            continue
        x, weight = argument(linear, 0), argument(linear, 1)
        scale, zero, w8, deq_scale, bias = _parameters(program, weight, parts)
        x8 = program.call(linear, ops.quantize, x, scale, zero)
        dtype = tensor_type(linear).dtype
        new = program.call(linear, ops.quant_linear, x8, w8, deq_scale, bias, dtype, name="linear")
        linear.replace_all_uses_with(new)
        yield hit(new)


def _why_not(weight: Node) -> str:
    """A dynamic one is left to insert_dynamic_quant."""
    dynamic = is_parameter(weight) and "w8a8_" in str(expression_of(weight))
    return "its input has a scale a token" if dynamic else "its weight is stored as float"


def _w8a8(weight: Node) -> tuple[Expression, ...] | None:
    """The five stored tensors that a W8A8 weight is made of."""
    expression: Arg = expression_of(weight) if is_parameter(weight) else None
    if isinstance(expression, Expression) and expression.op == "cast":
        expression = expression.args[0]
    if not isinstance(expression, Expression) or expression.op != "w8a8":
        return None
    return tuple(part for part in expression.args if isinstance(part, Expression))


def _parameters(program: Program, weight: Node, parts: tuple[Expression, ...]) -> tuple[Node, ...]:
    w8, in_scale, in_offset, deq_scale, bias = parts
    out, width = tensor_type(weight).shape
    name, f32 = weight.name.removesuffix("_weight"), torch.float32

    def one(part: str, expression: Expression) -> Node:
        scalar = Expression("reshape", (cast(expression, f32), (1,)))
        return program.placeholder(f"{name}_{part}", TensorType(f32, (1,)), scalar)

    return (
        one("input_scale", in_scale),
        one("input_zero", in_offset),
        program.placeholder(f"{name}_int8", TensorType(torch.int8, (out, width)), w8),
        program.placeholder(f"{name}_deq_scale", TensorType(f32, (out,)), deq_scale),
        program.placeholder(f"{name}_quant_bias", TensorType(torch.int32, (out,)), bias),
    )
