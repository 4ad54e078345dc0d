"""kvc8's quantization ops in ONNX, with the arithmetic of ir/ops.py bit for bit.

QuantizeLinear adds the zero point after it rounds, and kvc8 before: they differ where x/scale lies
halfway between two integers and the zero point is odd. So QuantizeLinear and DequantizeLinear
stand for the symmetric ops only, and zero points, which need not be integers, are added in float32.

MatMulInteger is exact by its definition. On x86 without VNNI, ONNX Runtime's sums saturate unless
session.x64quantprecision is 1, as runner.py sets it.
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import Attribute, Builder, Value
from kvc8.ir.program import argument, tensor_type
from kvc8.ir.types import Dim, TensorType

F32 = torch.float32


def quantize(b: Builder, node: Node, x: Value, scale: Value, zero: Value | None) -> Value:
    """`kvc8.quantize`."""
    wide, per = tensor_type(argument(node, 0)), tensor_type(argument(node, 1))
    x = b.cast(x, wide.dtype, F32)
    if zero is None and _fits(wide.shape, per):
        return _linear(
            b, "QuantizeLinear", x, wide.shape, scale, per, output_dtype=ir.DataType.INT8.value
        )
    y = b.op("Div", x, scale)
    y = y if zero is None else b.op("Add", y, zero)
    y = b.op("Clip", b.op("Round", y), b.number(-128, F32), b.number(127, F32))
    return b.cast(y, F32, torch.int8)


def dequantize(
    b: Builder, node: Node, q: Value, scale: Value, zero: Value | None, dtype: torch.dtype
) -> Value:
    """`kvc8.dequantize`."""
    return dequantized(b, node, q, tensor_type(node).shape)


def dequantized(b: Builder, node: Node, q: Value, shape: Sequence[Dim]) -> Value:
    """What a `kvc8.dequantize` gives for codes q [shape], which may be a part of its own."""
    per, dtype = tensor_type(argument(node, 1)), tensor_type(node).dtype
    scale = b.value(argument(node, 1))
    if node.args[2] is None and _fits(shape, per):
        return b.cast(_linear(b, "DequantizeLinear", q, shape, scale, per), F32, dtype)
    y = b.cast(q, torch.int8, F32)
    y = y if node.args[2] is None else b.op("Sub", y, b.value(argument(node, 2)))
    return b.cast(b.op("Mul", y, scale), F32, dtype)


def quant_linear(
    b: Builder,
    node: Node,
    x: Value,
    weight: Value,
    deq_scale: Value,
    quant_bias: Value | None,
    dtype: torch.dtype,
) -> Value:
    """`kvc8.quant_linear`."""
    acc = b.op("MatMulInteger", x, b.op("Transpose", weight, perm=[1, 0]))
    acc = acc if quant_bias is None else b.op("Add", acc, quant_bias)
    y = b.op("Mul", b.cast(acc, torch.int32, F32), deq_scale)
    return b.cast(y, F32, dtype)


def _fits(shape: Sequence[Dim], per: TensorType) -> bool:
    """Whether one scale belongs to each entry of the last, known dimensions of [shape]."""
    return len(per.shape) > 0 and per.shape == tuple(shape)[len(shape) - len(per.shape) :]


def _linear(
    b: Builder,
    kind: str,
    x: Value,
    shape: Sequence[Dim],
    scale: Value,
    per: TensorType,
    **attributes: Attribute,
) -> Value:
    """QuantizeLinear or DequantizeLinear over the last dimensions, which ONNX wants as one."""
    axis = len(shape) - len(per.shape)
    if len(per.shape) == 1:
        return b.op(kind, x, scale, axis=axis, **attributes)
    flat = b.op("Reshape", x, [*[0] * axis, -1])
    y = b.op(kind, flat, b.op("Reshape", scale, [-1]), axis=axis, **attributes)
    return b.op("Reshape", y, b.shape([*[0] * axis, *per.shape]))
