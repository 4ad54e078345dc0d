"""What has a scale a token, in ONNX: caches, and linears, alone and of a mixture's experts.

The arithmetic is that of ir/ops.py and ir/mixture_ops.py bit for bit. ONNX's DynamicQuantizeLinear
has one scale for the whole tensor and is asymmetric, so the scales are spelled out.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import Builder, Value
from kvc8.backends.onnx.products import point, unsigned
from kvc8.ir import mixture_ops, ops
from kvc8.ir.program import argument, tensor_type
from kvc8.ir.shapes import Op

F32 = torch.float32


def _quantize_tokens(
    b: Builder, node: Node, x: Value, smooth: Value | None = None
) -> Sequence[Value]:
    """`kvc8.quantize_tokens`: ONNX's Round is half to even."""
    dtype = tensor_type(argument(node, 0)).dtype
    wide = b.cast(x, dtype, F32)
    if smooth is not None:
        wide = b.op("Mul", wide, b.cast(smooth, dtype, F32))
    scale = b.op("Div", b.op("ReduceMax", b.op("Abs", wide), [-1], keepdims=1), b.number(127, F32))
    zero = b.op("Equal", scale, b.number(0, F32))
    codes = b.op("Round", b.op("Div", wide, b.op("Where", zero, b.number(1, F32), scale)))
    low, high = b.number(-128, F32), b.number(127, F32)
    codes = b.cast(b.op("Clip", codes, low, high), F32, torch.int8)
    return codes, b.op("Squeeze", scale, [-1])


def _dequantize_tokens(
    b: Builder, node: Node, q: Value, scale: Value, smooth: Value | None, dtype: torch.dtype
) -> Value:
    """`kvc8.dequantize_tokens`."""
    return dequantized_tokens(b, node, q, scale)


def dequantized_tokens(b: Builder, node: Node, q: Value, scale: Value) -> Value:
    """What a `kvc8.dequantize_tokens` gives for some of its codes [..., H, D] and their scales."""
    y = b.op("Mul", b.cast(q, torch.int8, F32), scale)
    if isinstance(smooth := node.args[2], Node):
        each = b.cast(b.value(smooth), tensor_type(smooth).dtype, F32)
        heads = b.shape([*map(int, tensor_type(node).shape[-2:])])
        y = b.op("Div", y, b.op("Reshape", each, heads))
    return b.cast(y, F32, tensor_type(node).dtype)


def _dynamic_linear(
    b: Builder,
    node: Node,
    x: Value,
    scale: Value,
    weight: Value,
    weight_scale: Value,
    bias: Value | None,
    dtype: torch.dtype,
) -> Value:
    """`kvc8.dynamic_linear`."""
    y = b.op("Mul", _products(b, x, weight), weight_scale)
    y = b.op("Mul", y, b.op("Unsqueeze", scale, [-1]))
    return b.cast(y if bias is None else b.op("Add", y, bias), F32, dtype)


def _products(b: Builder, x: Value, weight: Value) -> Value:
    """x·weight^T of int8, exact, as float32."""
    turned = unsigned(b, b.op("Transpose", weight, perm=[1, 0]))
    acc = b.op("MatMulInteger", unsigned(b, x), turned, point(b), point(b))
    return b.cast(acc, torch.int32, F32)


def _dynamic_grouped_linear(
    b: Builder,
    node: Node,
    x: Value,
    scale: Value,
    weight: Value,
    weight_scale: Value,
    counts: Value,
    dtype: torch.dtype,
) -> Value:
    """`kvc8.dynamic_grouped_linear`."""
    column = b.op("Unsqueeze", scale, [-1])

    def linear(expert: int, start: Value, end: Value) -> Value:
        rows, factor = (b.op("Slice", part, start, end, [0]) for part in (x, column))
        y = _products(b, rows, b.op("Gather", weight, expert, axis=0))
        return b.op("Mul", b.op("Mul", y, b.op("Gather", weight_scale, expert, axis=0)), factor)

    return b.cast(by_expert(b, node, counts, linear), F32, dtype)


def by_expert(
    b: Builder, node: Node, counts: Value, linear: Callable[[int, Value, Value], Value]
) -> Value:
    """What `linear` gives for each expert and its rows, from one number to another, together."""
    [count] = tensor_type(node.args[-2 if node.target is DYNAMIC else -1]).shape
    ends, start, parts = b.op("CumSum", counts, b.number(0, torch.int64)), b.shape([0]), []
    for expert in range(int(count)):
        end = b.op("Slice", ends, [expert], [expert + 1], [0])
        parts.append(linear(expert, start, end))
        start = end
    return b.op("Concat", *parts, axis=0)


DYNAMIC = mixture_ops.dynamic_grouped_linear
LOWERINGS: Mapping[Op, Callable[..., object]] = MappingProxyType(
    {
        ops.quantize_tokens: _quantize_tokens,
        ops.dequantize_tokens: _dequantize_tokens,
        ops.dynamic_linear: _dynamic_linear,
        mixture_ops.dynamic_grouped_linear: _dynamic_grouped_linear,
    }
)
