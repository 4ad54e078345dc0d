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
from kvc8.backends.onnx.builder import END, Builder, Value
from kvc8.backends.onnx.mixtures import MIXTURES
from kvc8.backends.onnx.quantization import dequantize, quant_linear, quantize
from kvc8.ir import ops
from kvc8.ir.errors import TargetError
from kvc8.ir.program import argument, tensor_type, type_of
from kvc8.ir.shapes import Op
from kvc8.ir.types import Dim

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


def _reshape(b: Builder, node: Node, x: Value, shape: Sequence[Dim]) -> Value:
    return b.op("Reshape", x, b.shape(shape))


def _flatten(b: Builder, node: Node, x: Value, start: int, end: int) -> Value:
    return b.op("Reshape", x, b.shape([*[0] * start, -1, *tensor_type(node).shape[start + 1 :]]))


def _unflatten(b: Builder, node: Node, x: Value, dim: int, sizes: Sequence[Dim]) -> Value:
    rest = tensor_type(node).shape[dim + len(sizes) :]
    return b.op("Reshape", x, b.shape([*[0] * dim, *sizes, *rest]))


def _expand(b: Builder, node: Node, x: Value, shape: Sequence[Dim], **_: object) -> Value:
    return b.op("Expand", x, b.shape([1 if d == -1 else d for d in shape]))


def _transpose(b: Builder, node: Node, x: Value, i: int, j: int) -> Value:
    perm = list(range(len(tensor_type(node).shape)))
    perm[i], perm[j] = perm[j], perm[i]
    return b.op("Transpose", x, perm=perm)


def _permute(b: Builder, node: Node, x: Value, dims: Sequence[int]) -> Value:
    return b.op("Transpose", x, perm=[d % len(dims) for d in dims])


def _unsqueeze(b: Builder, node: Node, x: Value, dim: int) -> Value:
    return b.op("Unsqueeze", x, [dim])


def _squeeze(b: Builder, node: Node, x: Value, dim: int) -> Value:
    one = tensor_type(argument(node, 0)).shape[dim] == 1
    return b.op("Squeeze", x, [dim]) if one else x


def _clamp(
    b: Builder, node: Node, x: Value, low: float | None = None, high: float | None = None
) -> Value:
    dtype = tensor_type(node).dtype
    x = x if low is None else b.op("Max", x, b.number(low, dtype))
    return x if high is None else b.op("Min", x, b.number(high, dtype))


def _reciprocal(b: Builder, node: Node, x: Value) -> Value:
    """By a division, which every CPU rounds alike; a reciprocal may be an approximation."""
    return b.op("Div", b.number(1, tensor_type(node).dtype), x)


def _squeeze_all(b: Builder, node: Node, x: Value) -> Value:
    return b.op("Reshape", x, b.shape(tensor_type(node).shape))


def _arange(b: Builder, node: Node, *ends: float, **_: object) -> Value:
    """From a start to an end, by a step."""
    return b.op("Range", *(b.number(end, tensor_type(node).dtype) for end in ends))


def _slice(
    b: Builder,
    node: Node,
    x: Value,
    dim: int = 0,
    start: Dim | None = None,
    end: Dim | None = None,
    step: int = 1,
) -> Value:
    bounds = b.shape([0 if start is None else start]), b.shape([END if end is None else end])
    return b.op("Slice", x, *bounds, [dim], [step])


def _select(b: Builder, node: Node, x: Value, dim: int, index: int) -> Value:
    return b.op("Gather", x, index, axis=dim)


def _index(b: Builder, node: Node, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [axis for axis, index in enumerate(indices) if index is not None]
    of = node.args[1][given[0]]  # type: ignore[index]
    if len(given) != 1 or tensor_type(of).dtype not in (torch.int64, torch.int32):
        raise TargetError(node.name, "onnx indexes by one list of rows", "use one, of integers")
    return b.op("Gather", x, indices[given[0]], axis=given[0])


def _index_select(b: Builder, node: Node, x: Value, dim: int, rows: Value) -> Value:
    return b.op("Gather", x, rows, axis=dim)


def _cat(b: Builder, node: Node, parts: Sequence[Value], dim: int = 0) -> Value:
    return b.op("Concat", *parts, axis=dim)


def _split(b: Builder, node: Node, x: Value, _: object, dim: int = 0) -> tuple[Value, ...]:
    """The parts that split and chunk give, whose sizes are known from their types."""
    parts, start = [], 0
    types = type_of(node)
    assert isinstance(types, tuple)
    for type_ in types:
        width = type_.shape[dim]  # type: ignore[union-attr]
        if not isinstance(width, int):
            raise TargetError(node.name, "onnx splits by known sizes", "split another dimension")
        parts.append(b.op("Slice", x, [start], [start + width], [dim], [1]))
        start += width
    return tuple(parts)


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


def _where(b: Builder, node: Node, condition: Value, x: object, y: object) -> Value:
    return b.op("Where", condition, _operand(b, node, 1, x), _operand(b, node, 2, y))


def _stack(b: Builder, node: Node, values: Sequence[Value], dim: int = 0) -> Value:
    at = dim % len(tensor_type(node).shape)
    return b.op("Concat", *(b.op("Unsqueeze", value, [at]) for value in values), axis=at)


def _square(b: Builder, node: Node, x: Value) -> Value:
    return b.op("Mul", x, x)


def _repeat_interleave(
    b: Builder, node: Node, x: Value, count: int, dim: int | None = None, **_: object
) -> Value:
    """Each item of a dimension, `count` times."""
    if dim is None:
        raise TargetError(node.name, "onnx repeats along a dimension", "name one")
    sizes = tensor_type(node).shape
    at = dim % len(sizes) + 1
    wide = [count if i == at else 1 for i in range(len(sizes) + 1)]
    each = b.op("Expand", b.op("Unsqueeze", x, [at]), wide)
    return b.op("Reshape", each, b.shape(sizes))


def _softmax(b: Builder, node: Node, x: Value, dim: int, *_: object) -> Value:
    return b.op("Softmax", _cast(b, node, x), axis=dim)


LOWERINGS: Mapping[Op, Lowering] = MappingProxyType(
    {
        **MIXTURES,
        **dynamic.LOWERINGS,
        ops.quantize: quantize,
        ops.dequantize: dequantize,
        ops.quant_linear: quant_linear,
        ops.cache_write: cache_write,
        ops.paged_attention: paged_attention,
        operator.getitem: _item,
        aten.add.Tensor: _binary("Add"),
        aten.addmm.default: _addmm,
        aten.alias.default: _same,
        aten.arange.start_step: _arange,
        aten.cat.default: _cat,
        aten.chunk.default: _split,
        aten.clamp.default: _clamp,
        aten.clone.default: _same,
        aten.contiguous.default: _same,
        aten.cos.default: _unary("Cos"),
        aten.detach.default: _same,
        aten.div.Tensor: _binary("Div"),
        aten.embedding.default: _embedding,
        aten.expand.default: _expand,
        aten.expm1.default: _expm1,
        aten.gelu.default: _gelu,
        aten.gt.Scalar: _greater,
        aten.flatten.using_ints: _flatten,
        aten.floor.default: _unary("Floor"),
        aten.index.Tensor: _index,
        aten.index_select.default: _index_select,
        aten.layer_norm.default: _layer_norm,
        aten.linear.default: _linear,
        aten.log.default: _unary("Log"),
        aten.matmul.default: _binary("MatMul"),
        aten.mean.dim: _mean,
        aten.min.other: _binary("Min"),
        aten.minimum.default: _binary("Min"),
        aten.mul.Tensor: _binary("Mul"),
        aten.neg.default: _unary("Neg"),
        aten.permute.default: _permute,
        aten.pow.Scalar: lambda b, node, base, x: b.op("Pow", _operand(b, node, 0, base), x),
        aten.pow.Tensor_Scalar: _pow,
        aten.reciprocal.default: _reciprocal,
        aten.relu.default: _unary("Relu"),
        aten.repeat_interleave.self_int: _repeat_interleave,
        aten.reshape.default: _reshape,
        aten.rsqrt.default: _rsqrt,
        aten.select.int: _select,
        aten.sigmoid.default: _unary("Sigmoid"),
        aten.silu.default: _silu,
        aten.sin.default: _unary("Sin"),
        aten.slice.Tensor: _slice,
        aten.softmax.int: _softmax,
        aten.softplus.default: _softplus,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split,
        aten.square.default: _square,
        aten.stack.default: _stack,
        aten.squeeze.default: _squeeze_all,
        aten.squeeze.dim: _squeeze,
        aten.sub.Tensor: _binary("Sub"),
        aten.tanh.default: _unary("Tanh"),
        aten.to.dtype: _cast,
        aten.to.dtype_layout: _cast,
        aten.transpose.int: _transpose,
        aten.type_as.default: _cast,
        aten.unflatten.int: _unflatten,
        aten.unsqueeze.default: _unsqueeze,
        aten.view.default: _reshape,
        aten.where.self: _where,
    }
)
