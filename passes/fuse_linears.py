"""Compute the linears of one input by one linear, whose weights lie one after the other.

q, k and v of a layer, or gate and up: the device reads the input once and launches once. The packed
weight is an expression, so nothing is written anew on disk.

before:
    def lowering(
        x: f16[1, T, 64],
        s: f32[1] = stored("is"),
        z: f32[1] = stored("io"),
        gate: i8[96, 64] = stored("g"),
        up: i8[96, 64] = stored("u"),
        gate_d: f32[96] = float_bits(stored("gd")),
        up_d: f32[96] = float_bits(stored("ud")),
        gate_b: i32[96] = stored("gb"),
        up_b: i32[96] = stored("ub"),
    ):
        quantize: i8[1, T, 64] = kvc8.quantize(x, s, z)  # mlp.gate
        linear: f16[1, T, 96] = kvc8.quant_linear(quantize, gate, gate_d, gate_b, f16)  # mlp.gate
        quantize_1: i8[1, T, 64] = kvc8.quantize(x, s, z)  # mlp.up
        linear_1: f16[1, T, 96] = kvc8.quant_linear(quantize_1, up, up_d, up_b, f16)  # mlp.up
        return [linear, linear_1]

after:
    def lowering(
        x: f16[1, T, 64],
        s: f32[1] = stored("is"),
        z: f32[1] = stored("io"),
        gate_up: i8[192, 64] = concat([stored("g"), stored("u")], 0),
        gate_up_d: f32[192] = concat([float_bits(stored("gd")), float_bits(stored("ud"))], 0),
        gate_up_b: i32[192] = concat([stored("gb"), stored("ub")], 0),
    ):
        quantize: i8[1, T, 64] = kvc8.quantize(x, s, z)  # mlp.gate
        linear_2: f16[1, T, 192] = kvc8.quant_linear(quantize, gate_up, gate_up_d, gate_up_b, f16)  # mlp
        split_with_sizes: (f16[1, T, 96], f16[1, T, 96]) = aten.split_with_sizes(linear_2, [96, 96], -1)  # mlp
        getitem: f16[1, T, 96] = split_with_sizes[0]  # mlp.gate
        getitem_1: f16[1, T, 96] = split_with_sizes[1]  # mlp.gate
        return [getitem, getitem_1]

Left apart where some of them are W8A8 and others float, where they quantize their input by different
scales, where only some have a bias, and where W8A8 linears would together be wider than the NPU's
product of int8 may be (gate and up of Llama 3.1 405B).

W8A8 results are the same, bit for bit; a matrix product of floats may sum in another order.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu, ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def fuse_linears(program: Program) -> Iterator[Remark]:
    """See the module."""
    for group in _groups(program):
        why = _why_not(group)
        if why:
            yield miss(group[0], why)
            continue
        yield hit(_pack(program, group), f"{len(group)} linears in one")


def _groups(program: Program) -> list[list[Node]]:
    """The linears that read one value, by module, where there are several."""
    found: dict[tuple[Node, str], list[Node]] = {}
    for linear in program.calls(ops.quant_linear, ops.dynamic_linear, ATEN.linear.default):
        x = argument(linear, 0)
        x = argument(x, 0) if is_call(x, ops.quantize) else x
        found.setdefault((x, _module(linear)), []).append(linear)
    return [group for group in found.values() if len(group) > 1]


def _module(linear: Node) -> str:
    return str(linear.meta.get("origin", "")).rpartition(".")[0]


def _why_not(group: list[Node]) -> str:
    if len({linear.target for linear in group}) > 1:
        return "of the linears of its input some are W8A8 and others float"
    if is_call(group[0], ops.quant_linear) and len(set(map(_quantizer, group))) > 1:
        return "the linears of its input quantize it by different scales or zero points"
    if len({_bias(linear) is None for linear in group}) > 1:
        return "of the linears of its input some have a bias and others none"
    width, widest = sum(_widths(group)), npu.WIDEST_QUANT_MATMUL
    if is_call(group[0], ops.quant_linear) and width > widest:
        return f"together they are {width:,} wide, and npu_quant_matmul is at most {widest:,}"
    return ""


def _widths(group: list[Node]) -> list[int]:
    return [int(tensor_type(linear).shape[-1]) for linear in group]


def _quantizer(linear: Node) -> tuple[Expression | None, ...]:
    """What the input is quantized by; equal expressions are equal values."""
    parts = argument(linear, 0).args[1:3]
    return tuple(expression_of(part) if isinstance(part, Node) else None for part in parts)


def _bias(linear: Node) -> Argument:
    at = {ops.quant_linear: 3, ops.dynamic_linear: 4}.get(linear.target, 2)  # type: ignore[call-overload]
    return linear.args[at] if len(linear.args) > at else None


def _pack(program: Program, group: list[Node]) -> Node:
    first = group[0]
    assert callable(first.target)
    own = 2 if is_call(first, ops.dynamic_linear) else 1  # arguments that are of the input
    parts_of = (_packed(program, group, i) for i in range(own, len(first.args)))
    args = [*first.args[:own], *parts_of]
    both = program.call(first, first.target, *args, name="linear")
    parts = program.call(first, ATEN.split_with_sizes.default, both, _widths(group), -1)
    for i, linear in enumerate(group):
        linear.replace_all_uses_with(program.call(first, getitem, parts, i))
    for node in (both, parts):
        node.meta["origin"] = _module(first)
    return both


def _packed(program: Program, group: list[Node], index: int) -> Argument:
    """The arguments of that index, one after the other; what is no tensor is the same for all."""
    nodes = [linear.args[index] for linear in group]
    if not isinstance(nodes[0], Node):
        return nodes[0]
    tensors = [node for node in nodes if isinstance(node, Node)]
    types = [tensor_type(node) for node in tensors]
    rows = sum(int(type_.shape[0]) for type_ in types)
    type_ = TensorType(types[0].dtype, (rows, *types[0].shape[1:]))
    expression = Expression("concat", (tuple(map(expression_of, tensors)), 0))
    return program.placeholder(_name(group, tensors[0].name), type_, expression)


def _name(group: list[Node], first: str) -> str:
    """The name of the first with those of the others in it: q_proj_k_proj_v_proj_int8."""
    leaves = [str(linear.meta.get("origin", "")).rpartition(".")[2] for linear in group]
    return first.replace(leaves[0], "_".join(leaves), 1) if leaves[0] in first else f"{first}_all"
