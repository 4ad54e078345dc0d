"""Compute W8A8 linears by npu_quantize and npu_quant_matmul; float linears stay as they are.

The device reads the dequantization scale of a float16 result as a 19-bit float (1 sign, 8
exponent, 10 fraction bits) packed into an int64; it is packed here by expression, never at run time.

before:
    def lowering(
        x: f16[1, T, 64],
        s: f32[1] = stored("is"),
        z: f32[1] = stored("io"),
        w: i8[32, 64] = stored("w"),
        d: f32[32] = float_bits(stored("ds")),
        b: i32[32] = stored("qb"),
    ):
        quantize: i8[1, T, 64] = kvc8.quantize(x, s, z)
        linear: f16[1, T, 32] = kvc8.quant_linear(quantize, w, d, b, f16)
        return [linear]

after:
    def lowering(
        x: f16[1, T, 64],
        s: f32[1] = stored("is"),
        b: i32[32] = stored("qb"),
        z_int: i32[1] = cast(stored("io"), i32),
        w_t: i8[64, 32] = transpose(stored("w"), 0, 1),
        d_packed: i64[32] = stored("ds"),
    ):
        npu_quantize: i8[1, T, 64] = npu.npu_quantize(x, s, z_int, 1, -1, True)
        linear_1: f16[1, T, 32] = npu.npu_quant_matmul(npu_quantize, w_t, d_packed, bias=b, output_dtype=5)
        return [linear_1]

Bound: the 19-bit scale is the float32 one cut off after 10 fraction bits, so a float16 result is
smaller by at most one part in 1024, and then rounded. With a bfloat16 or float32 result the scale
stays float32 and the result is the same, bit for bit (float32 is for checking numbers on a CPU; no
device takes it). What ranks added up is scaled as one device scales its own sums: for float16 by
npu_dequant_bias, with the same 19 bits. For bfloat16 that op would take a bfloat16 scale, off by one
part in 512, so ATen adds the bias and scales in float32, which is exact and three launches more.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import npu, ops, rank_ops
from kvc8.ir.expression import Expression, cast, values
from kvc8.ir.program import Program, Stage, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
ONE = TensorType(torch.float32, (1,))


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far a result may be from what it was: see the module. The 19-bit scale loses 2**-10."""
    of_ranks = is_call(old, rank_ops.dequant_sum)
    scales = of_ranks or (is_call(new, npu.npu_quant_matmul) and "pertoken_scale" not in new.kwargs)
    if scales and tensor_type(new).dtype is torch.float16:
        return look(old).abs() * 2.0**-10
    return torch.zeros(())


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="quantizing", bound=bound)
def lower_linear(program: Program) -> Iterator[Remark]:
    """See the module."""
    for quantize in program.calls(ops.quantize):
        x, scale, zero = quantize.args
        whole = _derived(program, zero, "_int", torch.int32) if isinstance(zero, Node) else None
        codes = program.call(
            quantize, npu.npu_quantize, x, scale, whole, npu.SCALAR_TYPES[torch.int8], -1, True
        )
        quantize.replace_all_uses_with(codes)
    for linear in program.calls(ops.quant_linear):
        x8, weight, deq_scale, bias, dtype = linear.args
        assert isinstance(weight, Node)
        assert isinstance(deq_scale, Node)
        options = {"bias": bias, "output_dtype": npu.SCALAR_TYPES[dtype]}  # type: ignore[index]
        args = (x8, _transposed(program, weight), _packed(program, deq_scale, linear))
        new = program.call(linear, npu.npu_quant_matmul, *args, name="linear", kwargs=options)
        linear.replace_all_uses_with(new)
        yield hit(new)
    for linear in program.calls(rank_ops.int_linear):
        yield hit(_int_linear(program, linear), "its int32 sums, which ranks add up")
    for scaled in program.calls(rank_ops.dequant_sum):
        yield hit(_dequant_sum(program, scaled), "what ranks added up")
    for linear in program.calls(ATEN.linear.default):
        yield miss(linear, "its weight is float; ATen's linear runs it")


def _int_linear(program: Program, linear: Node) -> Node:
    """The sums of a rank; the op asks for a scale, which int32 results do not take."""
    x8, weight, *bias = linear.args
    assert isinstance(weight, Node)
    found = [node for node in program.parameters() if node.name == "no_scale"]
    one = values(torch.ones(1))
    scale = found[0] if found else program.placeholder("no_scale", ONE, one)
    options = {"bias": bias[0] if bias else None, "output_dtype": npu.SCALAR_TYPES[torch.int32]}
    args = (x8, _transposed(program, weight), scale)
    new = program.call(linear, npu.npu_quant_matmul, *args, name="linear", kwargs=options)
    linear.replace_all_uses_with(new)
    return new


def _dequant_sum(program: Program, scaled: Node) -> Node:
    """Scale the sum of all ranks, [1, T, O], by an op that takes rows."""
    sums, deq_scale, bias, dtype = scaled.args
    assert isinstance(deq_scale, Node)
    assert isinstance(dtype, torch.dtype)
    if dtype is torch.bfloat16:
        return _scaled_in_float32(program, scaled)
    width = tensor_type(scaled).shape[-1]
    rows = program.call(scaled, ATEN.reshape.default, sums, [-1, width])
    args = (rows, _scale_of_sums(program, deq_scale, dtype), None, bias)
    options = {"output_dtype": dtype}
    new = program.call(scaled, npu.npu_dequant_bias, *args, kwargs=options)
    shaped = program.call(scaled, ATEN.reshape.default, new, [1, -1, width])
    scaled.replace_all_uses_with(shaped)
    return shaped


def _scaled_in_float32(program: Program, scaled: Node) -> Node:
    """The sum of all ranks scaled call by call, for `npu_dequant_bias` rounds the scale."""
    sums, deq_scale, bias, dtype = scaled.args
    whole = sums if bias is None else program.call(scaled, ATEN.add.Tensor, sums, bias)
    value = program.call(scaled, ATEN.to.dtype, whole, torch.float32)
    value = program.call(scaled, ATEN.mul.Tensor, value, deq_scale)
    new = program.call(scaled, ATEN.to.dtype, value, dtype)
    scaled.replace_all_uses_with(new)
    return new


def _scale_of_sums(program: Program, deq_scale: Node, dtype: torch.dtype) -> Node:
    """As `npu_dequant_bias` takes it: for float16 cut as a matmul of the whole would read it."""
    if dtype is not torch.float16:
        return deq_scale
    cut = Expression("fp19", (expression_of(deq_scale),))
    return program.placeholder(f"{deq_scale.name}_fp19", tensor_type(deq_scale), cut)


def _derived(program: Program, source: Node, suffix: str, dtype: torch.dtype) -> Node:
    type_ = TensorType(dtype, tensor_type(source).shape)
    return program.placeholder(source.name + suffix, type_, cast(expression_of(source), dtype))


def _transposed(program: Program, weight: Node) -> Node:
    """npu_quant_matmul takes the weight as [K, O]; a view at load time costs nothing."""
    out, width = tensor_type(weight).shape
    expression = Expression("transpose", (expression_of(weight), 0, 1))
    name = weight.name.removesuffix("_int8") + "_t"
    return program.placeholder(name, TensorType(torch.int8, (width, out)), expression)


def _packed(program: Program, deq_scale: Node, linear: Node) -> Node:
    if tensor_type(linear).dtype is not torch.float16:
        return deq_scale
    type_ = TensorType(torch.int64, tensor_type(deq_scale).shape)
    return program.placeholder(f"{deq_scale.name}_packed", type_, _bits(expression_of(deq_scale)))


def _bits(expression: Expression) -> Expression:
    """The bits of float32 values; bits that the checkpoint has are taken as they are."""
    inner = expression.args[0] if expression.args else None
    if expression.op == "float_bits" and isinstance(inner, Expression):
        return inner
    if expression.op == "concat" and isinstance(inner, tuple):
        parts = tuple(_bits(part) for part in inner if isinstance(part, Expression))
        return Expression("concat", (parts, *expression.args[1:]))
    return Expression("int_bits", (expression,))
