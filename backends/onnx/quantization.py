"""kvc8's quantization ops in ONNX, with the arithmetic of ir/ops.py bit for bit.

QuantizeLinear adds the zero point after it rounds, and kvc8 before: they differ where x/scale lies
halfway between two integers and the zero point is odd. So zero points, which need not be integers,
are added in float32, and QuantizeLinear then rounds that by a scale of 1.

A linear's codes are kept 128 higher in uint8, with a zero point of 128, and so are its weight's:
products.py says why.
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import Attribute, Builder, Value
from kvc8.backends.onnx.products import point, unsigned
from kvc8.ir import ops
from kvc8.ir.program import argument, is_call, tensor_type
from kvc8.ir.types import Dim, TensorType

F32 = torch.float32


def quantize(b: Builder, node: Node, x: Value, scale: Value, zero: Value | None) -> Value:
    """`kvc8.quantize`."""
    return _codes(b, node, None)


def _codes(b: Builder, node: Node, above: Value | None) -> Value:
    """The codes of a `kvc8.quantize`: int8, or 128 more in uint8 where `above` is that number."""
    wide, per = tensor_type(argument(node, 0)), tensor_type(argument(node, 1))
    x, scale = (b.value(argument(node, i)) for i in (0, 1))
    x = b.cast(x, wide.dtype, F32)
    to = (ir.DataType.INT8 if above is None else ir.DataType.UINT8).value
    if node.args[2] is None and set(per.shape) <= {1}:
        return b.op("QuantizeLinear", x, b.op("Squeeze", scale), above, output_dtype=to)
    if node.args[2] is None and above is None and _fits(wide.shape, per):
        return _linear(b, "QuantizeLinear", x, wide.shape, scale, per, output_dtype=to)
    y = b.op("Div", x, scale)
    y = y if node.args[2] is None else b.op("Add", y, b.value(argument(node, 2)))
    return b.op("QuantizeLinear", y, b.number(1, F32), above, output_dtype=to)


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
    acc = b.op("MatMulInteger", *operands(b, node, x, weight), point(b), point(b))
    acc = acc if quant_bias is None else b.op("Add", acc, quant_bias)
    y = b.op("Mul", b.cast(acc, torch.int32, F32), deq_scale)
    return b.cast(y, F32, dtype)


def operands(b: Builder, node: Node, x: Value, weight: Value) -> tuple[Value, Value]:
    """The codes of a linear's input and of its turned weight [K, O], both 128 higher."""
    turned = unsigned(b, b.op("Transpose", weight, perm=[1, 0]))
    if is_call(node.args[0], ops.quantize):
        return _codes(b, argument(node, 0), point(b)), turned
    return unsigned(b, x), turned


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
