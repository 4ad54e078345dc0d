"""Ops that lay values out otherwise and compute nothing, in ONNX: shapes, slices, gathers."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import END, Builder, Value
from kvc8.ir.errors import TargetError
from kvc8.ir.program import argument, tensor_type, type_of
from kvc8.ir.shapes import Op
from kvc8.ir.types import Dim

aten = torch.ops.aten


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


def _stack(b: Builder, node: Node, values: Sequence[Value], dim: int = 0) -> Value:
    at = dim % len(tensor_type(node).shape)
    return b.op("Concat", *(b.op("Unsqueeze", value, [at]) for value in values), axis=at)


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


SHAPING: Mapping[Op, Callable[..., object]] = MappingProxyType(
    {
        aten.arange.start_step: _arange,
        aten.cat.default: _cat,
        aten.concat.default: _cat,
        aten.chunk.default: _split,
        aten.expand.default: _expand,
        aten.repeat.default: lambda b, node, x, times: b.op("Tile", x, b.shape(times)),
        aten.flatten.using_ints: _flatten,
        aten.index.Tensor: _index,
        aten.index_select.default: _index_select,
        aten.permute.default: _permute,
        aten.repeat_interleave.self_int: _repeat_interleave,
        aten.reshape.default: _reshape,
        aten.select.int: _select,
        aten.slice.Tensor: _slice,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split,
        aten.stack.default: _stack,
        aten.squeeze.default: _squeeze_all,
        aten.squeeze.dim: _squeeze,
        aten.transpose.int: _transpose,
        aten.unflatten.int: _unflatten,
        aten.unsqueeze.default: _unsqueeze,
        aten.view.default: _reshape,
    }
)
