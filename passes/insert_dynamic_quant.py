"""Compute W8A8_DYNAMIC linears as the checkpoint means them, alone and of a mixture's experts.

Each token's values are quantized by a scale of their own, max|x| / 127. A W8A8_MIX linear, which is
stored for both ways, is taken dynamically in every phase, as vllm-ascend does where one node does
both; what is static of it goes along in `mixed(...)`. Linears that read the same rows share their
codes.

before:
    def captured(
        x: f16[1, T, 64],
        w: f16[32, 64] = cast(w8a8_dynamic(stored("w"), stored("ws")), f16),
        b: f16[32] = cast(stored("b"), f16),
    ):
        linear: f16[1, T, 32] = aten.linear(x, w, b)
        return [linear]

after:
    def captured(
        x: f16[1, T, 64],
        w_int8: i8[32, 64] = stored("w"),
        w_scale: f32[32] = reshape(cast(stored("ws"), f32), [32]),
        b_wide: f32[32] = cast(stored("b"), f32),
    ):
        quantize_tokens: (i8[1, T, 64], f32[1, T]) = kvc8.quantize_tokens(x)
        getitem: i8[1, T, 64] = quantize_tokens[0]
        getitem_1: f32[1, T] = quantize_tokens[1]
        linear_1: f16[1, T, 32] = kvc8.dynamic_linear(getitem, getitem_1, w_int8, w_scale, b_wide, f16)
        return [linear_1]

Bound: x = s*q + e with |e| <= s/2, where s is the scale of the token, and the sum over K is exact, so
that output o differs from the float linear by at most s/2 * sum_k |w[o, k]|; nothing is clipped.
"""

from collections.abc import Callable, Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import mixture_ops, ops
from kvc8.ir.expression import Expression, cast
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

LINEAR = torch.ops.aten.linear.default
F32 = torch.float32


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far each output may be from the float linear's: see the module."""
    if not is_call(new, ops.dynamic_linear, mixture_ops.dynamic_grouped_linear):
        return torch.zeros(())
    scale, weight, weight_scale = (look(argument(new, i)).double() for i in (1, 2, 3))
    size = (weight.abs().sum(-1)) * weight_scale
    if is_call(new, mixture_ops.dynamic_grouped_linear):
        size = size[mixture_ops.owners(look(argument(new, 4)).long())]
    return scale[..., None] / 2 * size


@rewrite(takes=Stage.CAPTURED, gives=Stage.CAPTURED, contract="quantizing", bound=bound)
def insert_dynamic_quant(program: Program) -> Iterator[Remark]:
    """See the module."""
    codes: dict[Node, tuple[Node, Node]] = {}
    for linear in program.calls(LINEAR, mixture_ops.grouped_linear):
        parts = _parts(argument(linear, 1))
        if parts is None:
            yield from _why_not(linear)
            continue
        x = argument(linear, 0)
        if x not in codes:
            codes[x] = _codes(program, linear, x)
        weights = _parameters(program, argument(linear, 1), parts)
        rest: tuple[Argument, ...] = (tensor_type(linear).dtype,)
        if is_call(linear, LINEAR):
            op, rest = ops.dynamic_linear, (_bias(program, linear), *rest)
        else:
            op, rest = mixture_ops.dynamic_grouped_linear, (linear.args[3], *rest)
        new = program.call(linear, op, *codes[x], *weights, *rest, name="linear")
        linear.replace_all_uses_with(new)
        yield hit(new)


def _why_not(linear: Node) -> Iterator[Remark]:
    if is_call(linear, mixture_ops.grouped_linear):
        yield miss(linear, "the weights of its experts are stored as float")


def _parts(weight: Node) -> tuple[Expression, ...] | None:
    """The stored tensors that a dynamic weight is made of: w8, its scale, what is static of it."""
    found = expression_of(weight) if is_parameter(weight) else None
    if found is not None and found.op == "cast" and isinstance(found.args[0], Expression):
        found = found.args[0]
    if found is None or found.op not in ("w8a8_dynamic", "w8a8_mix"):
        return None
    return tuple(part for part in found.args if isinstance(part, Expression))


def _codes(program: Program, linear: Node, x: Node) -> tuple[Node, Node]:
    both = program.call(linear, ops.quantize_tokens, x)
    return program.call(linear, getitem, both, 0), program.call(linear, getitem, both, 1)


def _parameters(program: Program, weight: Node, parts: tuple[Expression, ...]) -> tuple[Node, Node]:
    """The int8 weight [..., out, in] and its scale, float32 [..., out]."""
    w8, scale, *static = parts
    shape = tensor_type(weight).shape
    name = weight.name.removesuffix("_weight")
    whole = Expression("mixed", (w8, *static)) if static else w8
    sizes = tuple(int(size) for size in shape[:-1])
    flat = Expression("reshape", (cast(scale, F32), sizes))
    return (
        program.placeholder(f"{name}_int8", TensorType(torch.int8, shape), whole),
        program.placeholder(f"{name}_scale", TensorType(F32, shape[:-1]), flat),
    )


def _bias(program: Program, linear: Node) -> Node | None:
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, Node):
        return None
    found = expression_of(bias)
    inner = found.args[0] if found.op == "cast" else found
    assert isinstance(inner, Expression)
    type_ = TensorType(F32, tensor_type(bias).shape)
    return program.placeholder(f"{bias.name}_wide", type_, cast(inner, F32))
