"""What each op of a program becomes in ONNX: one function an op, and the table of them all.

A lowering takes the builder, the node, and the node's arguments with each node in them replaced by
its ONNX value. Whole numbers that depend on a size arrive as expressions of it.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.backends.onnx import dynamic
from kvc8.backends.onnx.attention import cache_write, paged_attention
from kvc8.backends.onnx.builder import Builder, Value
from kvc8.backends.onnx.mixtures import MIXTURES
from kvc8.backends.onnx.quantization import dequantize, quant_linear, quantize
from kvc8.backends.onnx.shaping import SHAPING
from kvc8.ir import ops
from kvc8.ir.errors import TargetError
from kvc8.ir.program import argument, tensor_type
from kvc8.ir.shapes import Op

Lowering = Callable[..., object]
aten = torch.ops.aten


def _unary(kind: str) -> Lowering:
    return lambda b, node, x: b.op(kind, x)


def _binary(kind: str) -> Lowering:
    def lower(b: Builder, node: Node, x: object, y: object, alpha: float = 1) -> Value:
        if alpha != 1:
            raise TargetError(node.name, "onnx has no alpha", "multiply before the call")
        return b.op(kind, _operand(b, node, 0, x), _operand(b, node, 1, y))

    return lower


def _operand(b: Builder, node: Node, index: int, x: object) -> Value:
    """An operand in the dtype of the result, as torch promotes it."""
    dtype, arg = tensor_type(node).dtype, node.args[index]
    if isinstance(x, int | float):
        return b.number(x, dtype)
    if isinstance(arg, Node) and isinstance(x, Value):
        return b.cast(x, tensor_type(arg).dtype, dtype)
    raise TargetError(node.name, f"onnx has no {x} as a number", "use a tensor or a constant")


def _same(b: Builder, node: Node, x: Value, *_: object, **__: object) -> Value:
    return x


def _cast(b: Builder, node: Node, x: Value, *_: object, **__: object) -> Value:
    return b.cast(x, tensor_type(argument(node, 0)).dtype, tensor_type(node).dtype)


def _linear(b: Builder, node: Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    y = b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))
    return y if bias is None else b.op("Add", y, bias)


def _addmm(b: Builder, node: Node, bias: Value, x: Value, weight: Value) -> Value:
    return b.op("Add", b.op("MatMul", x, weight), bias)


def _embedding(b: Builder, node: Node, weight: Value, rows: Value, *_: object) -> Value:
    return b.op("Gather", weight, rows, axis=0)


def _clamp(
    b: Builder, node: Node, x: Value, low: float | None = None, high: float | None = None
) -> Value:
    dtype = tensor_type(node).dtype
    x = x if low is None else b.op("Max", x, b.number(low, dtype))
    return x if high is None else b.op("Min", x, b.number(high, dtype))


def _clamp_to(
    b: Builder, node: Node, x: Value, min: Value | None = None, max: Value | None = None
) -> Value:
    """Between tensors of the dtype of x, which have PyTorch's names."""
    x = x if min is None else b.op("Max", x, min)
    return x if max is None else b.op("Min", x, max)


def _reciprocal(b: Builder, node: Node, x: Value) -> Value:
    """By a division, which every CPU rounds alike; a reciprocal may be an approximation."""
    return b.op("Div", b.number(1, tensor_type(node).dtype), x)


def _item(b: Builder, node: Node, parts: tuple[Value, ...], index: int) -> Value:
    return parts[index]


def _mean(b: Builder, node: Node, x: Value, dims: list[int], keepdim: bool = False) -> Value:
    return b.op("ReduceMean", x, dims, keepdims=int(keepdim))


def _pow(b: Builder, node: Node, x: Value, exponent: float) -> Value:
    return b.op("Pow", x, b.number(exponent, tensor_type(node).dtype))


def _rsqrt(b: Builder, node: Node, x: Value) -> Value:
    return b.op("Reciprocal", b.op("Sqrt", x))


def _silu(b: Builder, node: Node, x: Value) -> Value:
    return b.op("Mul", x, b.op("Sigmoid", x))


def _gelu(b: Builder, node: Node, x: Value, approximate: str = "none") -> Value:
    """Of doubles by tanh spelled out: ONNX defines Gelu by constants of float32's precision."""
    dtype = tensor_type(node).dtype
    if dtype is not torch.float64 or approximate != "tanh":
        return b.op("Gelu", x, approximate=approximate)
    cube = b.op("Mul", b.op("Mul", x, x), x)
    bent = b.op("Add", x, b.op("Mul", cube, b.number(0.044715, dtype)))
    curve = b.op("Tanh", b.op("Mul", bent, b.number(math.sqrt(2 / math.pi), dtype)))
    half = b.op("Mul", x, b.number(0.5, dtype))
    return b.op("Mul", half, b.op("Add", curve, b.number(1, dtype)))


def _softplus(b: Builder, node: Node, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    """Torch gives x itself past the threshold, where the sum with one would round to it or less."""
    dtype = tensor_type(node).dtype
    scaled = x if beta == 1 else b.op("Mul", x, b.number(beta, dtype))
    curve = b.op("Softplus", scaled)
    curve = curve if beta == 1 else b.op("Div", curve, b.number(beta, dtype))
    return b.op("Where", b.op("Greater", scaled, b.number(threshold, dtype)), x, curve)


def _layer_norm(
    b: Builder,
    node: Node,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Value:
    if weight is None:
        weight = b.op("Expand", b.number(1, tensor_type(node).dtype), b.shape(shape))
    given = (weight,) if bias is None else (weight, bias)
    return b.op("LayerNormalization", x, *given, axis=-len(shape), epsilon=eps)


def _expm1(b: Builder, node: Node, x: Value) -> Value:
    """By e^x - 1 = tanh(x/2) (e^x + 1), which loses no digits near zero."""
    one, half = (b.number(value, tensor_type(node).dtype) for value in (1, 0.5))
    return b.op("Mul", b.op("Tanh", b.op("Mul", x, half)), b.op("Add", b.op("Exp", x), one))


def _greater(b: Builder, node: Node, x: Value, limit: float) -> Value:
    return b.op("Greater", x, b.number(limit, tensor_type(argument(node, 0)).dtype))


def _max_of(b: Builder, node: Node, x: Value, dim: int, keepdim: bool = False) -> Sequence[Value]:
    """The largest along a dimension, and where the first of them is."""
    largest = b.op("ReduceMax", x, [dim], keepdims=int(keepdim))
    return largest, b.op("ArgMax", x, axis=dim, keepdims=int(keepdim))


def _where(b: Builder, node: Node, condition: Value, x: object, y: object) -> Value:
    return b.op("Where", condition, _operand(b, node, 1, x), _operand(b, node, 2, y))


def _square(b: Builder, node: Node, x: Value) -> Value:
    return b.op("Mul", x, x)


def _softmax(b: Builder, node: Node, x: Value, dim: int, *_: object) -> Value:
    return b.op("Softmax", _cast(b, node, x), axis=dim)


LOWERINGS: Mapping[Op, Lowering] = MappingProxyType(
    {
        **MIXTURES,
        **dynamic.LOWERINGS,
        **SHAPING,
        ops.quantize: quantize,
        ops.dequantize: dequantize,
        ops.quant_linear: quant_linear,
        ops.cache_write: cache_write,
        ops.paged_attention: paged_attention,
        operator.getitem: _item,
        aten.abs.default: _unary("Abs"),
        aten.add.Tensor: _binary("Add"),
        aten.addmm.default: _addmm,
        aten.alias.default: _same,
        aten.clamp.default: _clamp,
        aten.clamp.Tensor: _clamp_to,
        aten.clone.default: _same,
        aten.contiguous.default: _same,
        aten.cos.default: _unary("Cos"),
        aten.detach.default: _same,
        aten.div.Tensor: _binary("Div"),
        aten.embedding.default: _embedding,
        aten.expm1.default: _expm1,
        aten.gelu.default: _gelu,
        aten.gt.Scalar: _greater,
        aten.floor.default: _unary("Floor"),
        aten.layer_norm.default: _layer_norm,
        aten.linear.default: _linear,
        aten.log.default: _unary("Log"),
        aten.matmul.default: _binary("MatMul"),
        aten.max.dim: _max_of,
        aten.mean.dim: _mean,
        aten.min.other: _binary("Min"),
        aten.minimum.default: _binary("Min"),
        aten.mul.Tensor: _binary("Mul"),
        aten.neg.default: _unary("Neg"),
        aten.pow.Scalar: lambda b, node, base, x: b.op("Pow", _operand(b, node, 0, base), x),
        aten.pow.Tensor_Scalar: _pow,
        aten.reciprocal.default: _reciprocal,
        aten.relu.default: _unary("Relu"),
        aten.rsqrt.default: _rsqrt,
        aten.sigmoid.default: _unary("Sigmoid"),
        aten.silu.default: _silu,
        aten.sin.default: _unary("Sin"),
        aten.softmax.int: _softmax,
        aten.softplus.default: _softplus,
        aten.square.default: _square,
        aten.sub.Tensor: _binary("Sub"),
        aten.tanh.default: _unary("Tanh"),
        aten.to.dtype: _cast,
        aten.to.dtype_layout: _cast,
        aten.type_as.default: _cast,
        aten.where.self: _where,
    }
)
