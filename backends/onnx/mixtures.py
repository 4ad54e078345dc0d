"""What a mixture of experts is made of in ONNX: choosing, sorting, counting, and grouped linears.

Rows are sorted by expert and each expert's linear gets its own slice of them, however many that
are. So a model's file grows by a few nodes an expert and layer, and no row meets an expert that was
not chosen for it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import Builder, Value
from kvc8.backends.onnx.dynamic import by_expert
from kvc8.ir import mixture_ops
from kvc8.ir.errors import TargetError
from kvc8.ir.program import argument, is_call, tensor_type
from kvc8.ir.shapes import Op
from kvc8.ir.types import Dim

I64 = torch.int64
aten = torch.ops.aten


def _route(b: Builder, node: Node, x: Value, experts: Value, count: int) -> Sequence[Value]:
    """`kvc8.route`; TopK of all puts equal ones in the order in which they came."""
    shape, dtype = tensor_type(argument(node, 1)).shape, tensor_type(argument(node, 1)).dtype
    flat = b.op("Reshape", b.cast(experts, dtype, I64), [-1])
    size = b.op("Shape", flat)
    order = _order(b, flat, size)
    places = _order(b, order, size)
    rows = b.op("Gather", x, b.op("Div", order, b.number(int(shape[1]), I64)), axis=0)
    found = b.op("Equal", b.op("Unsqueeze", flat, [1]), b.constant(torch.arange(count)))
    counts = b.op("ReduceSum", b.cast(found, torch.bool, I64), [0], keepdims=0)
    return rows, b.cast(places, I64, torch.int32), counts


def _order(b: Builder, x: Value, size: Value) -> Value:
    """Where the values of x lie, the least first."""
    _, places = b.call("", "TopK", x, size, outputs=2, axis=0, largest=0, sorted=1)
    return places


def _combine(b: Builder, node: Node, rows: Value, places: Value, weights: Value) -> Value:
    """`kvc8.combine`."""
    dtype, weighted = tensor_type(node).dtype, tensor_type(argument(node, 2))
    wide = torch.promote_types(dtype, torch.float32)
    each = b.op("Gather", b.cast(rows, dtype, wide), places, axis=0)
    width = tensor_type(node).shape[1]
    each = b.op("Reshape", each, b.shape([-1, weighted.shape[1], width]))
    factor = b.op("Unsqueeze", b.cast(weights, weighted.dtype, wide), [-1])
    return b.cast(b.op("ReduceSum", b.op("Mul", each, factor), [1], keepdims=0), wide, dtype)


def _grouped_linear(
    b: Builder, node: Node, x: Value, weight: Value, bias: Value | None, counts: Value
) -> Value:
    """`kvc8.grouped_linear`."""

    def linear(expert: int, start: Value, end: Value) -> Value:
        matrix = b.op("Transpose", b.op("Gather", weight, expert, axis=0), perm=[1, 0])
        made = b.op("MatMul", b.op("Slice", x, start, end, [0]), matrix)
        return made if bias is None else b.op("Add", made, b.op("Gather", bias, expert, axis=0))

    return by_expert(b, node, counts, linear)


def _topk(
    b: Builder,
    node: Node,
    x: Value,
    k: int,
    dim: int = -1,
    largest: bool = True,
    ordered: bool = True,
) -> Sequence[Value]:
    options = {"axis": dim, "largest": int(largest), "sorted": int(ordered)}
    return b.call("", "TopK", x, [k], outputs=2, **options)


def _sort(
    b: Builder, node: Node, x: Value, dim: int = -1, descending: bool = False
) -> Sequence[Value]:
    """All of them by TopK, which puts equal ones in the order in which they came."""
    count = b.size(tensor_type(node.args[0]).shape[dim])
    options = {"axis": dim, "largest": int(descending), "sorted": 1}
    return b.call("", "TopK", x, count, outputs=2, **options)


def _floor_divide(b: Builder, node: Node, x: Value, divisor: object) -> Value:
    """Whole numbers: ONNX's Div rounds to zero, its Mod has the divisor's sign."""
    dtype = tensor_type(node).dtype
    if not isinstance(divisor, int) or dtype not in (torch.int64, torch.int32):
        raise TargetError(node.name, "onnx divides whole numbers by a constant", "use one")
    by = b.number(divisor, dtype)
    return b.op("Div", b.op("Sub", x, b.op("Mod", x, by)), by)


def _histc(b: Builder, node: Node, x: Value, bins: int, low: float, high: float) -> Value:
    """How often each whole number from `low` to `high` occurs in x, which holds no others."""
    whole = argument(node, 0)
    whole = argument(whole, 0) if is_call(whole, aten.to.dtype) else whole
    if bins != high - low + 1 or tensor_type(whole).dtype.is_floating_point:
        raise TargetError(node.name, "onnx counts whole numbers", "use a bin for each of them")
    each = b.constant(torch.arange(int(low), int(high) + 1))
    rows = b.op("Unsqueeze", b.cast(b.value(whole), tensor_type(whole).dtype, I64), [1])
    counts = b.op("ReduceSum", b.cast(b.op("Equal", rows, each), torch.bool, I64), [0], keepdims=0)
    return b.cast(counts, I64, tensor_type(node).dtype)


def _cumsum(b: Builder, node: Node, x: Value, dim: int, **_: object) -> Value:
    x = b.cast(x, tensor_type(argument(node, 0)).dtype, tensor_type(node).dtype)
    return b.op("CumSum", x, b.number(dim, I64))


def _arange(b: Builder, node: Node, end: Dim, **_: object) -> Value:
    if tensor_type(node).dtype is not I64:
        raise TargetError(node.name, "onnx counts in int64", "cast after the call")
    return b.op("Range", b.number(0, I64), b.op("Squeeze", b.size(end), [0]), b.number(1, I64))


def _empty_like(b: Builder, node: Node, x: Value, **_: object) -> Value:
    """Zeros, which is one of the things that memory may hold."""
    return b.op("Expand", b.number(0, tensor_type(node).dtype), b.op("Shape", x))


def _index_put(
    b: Builder,
    node: Node,
    x: Value,
    indices: Sequence[Value | None],
    values: Value,
    add: bool = False,
) -> Value:
    if len(indices) != 1 or indices[0] is None or add:
        raise TargetError(node.name, "onnx writes to one list of rows", "use one, without adding")
    return b.op("ScatterND", x, b.op("Unsqueeze", indices[0], [-1]), values)


def _masked_fill(b: Builder, node: Node, x: Value, mask: Value, fill: float) -> Value:
    return b.op("Where", mask, b.number(fill, tensor_type(node).dtype), x)


def _scatter(b: Builder, node: Node, x: Value, dim: int, index: Value, fill: float) -> Value:
    """One number at the places of an index [..., k] along a dimension."""
    spread = b.op("Expand", b.number(fill, tensor_type(node).dtype), b.op("Shape", index))
    return b.op("ScatterElements", x, index, spread, axis=dim)


def _gather(b: Builder, node: Node, x: Value, dim: int, index: Value) -> Value:
    return b.op("GatherElements", x, index, axis=dim)


def _not(b: Builder, node: Node, x: Value) -> Value:
    if tensor_type(node).dtype is not torch.bool:
        raise TargetError(node.name, "onnx inverts truths here and no bits", "cast before")
    return b.op("Not", x)


def _sum(
    b: Builder, node: Node, x: Value, dims: list[int], keepdim: bool = False, **_: object
) -> Value:
    x = b.cast(x, tensor_type(argument(node, 0)).dtype, tensor_type(node).dtype)
    return b.op("ReduceSum", x, dims, keepdims=int(keepdim))


MIXTURES: Mapping[Op, Callable[..., object]] = MappingProxyType(
    {
        mixture_ops.route: _route,
        mixture_ops.combine: _combine,
        mixture_ops.grouped_linear: _grouped_linear,
        aten.arange.default: _arange,
        aten.bitwise_not.default: _not,
        aten.cumsum.default: _cumsum,
        aten.empty_like.default: _empty_like,
        aten.floor_divide.default: _floor_divide,
        aten.gather.default: _gather,
        aten.histc.default: _histc,
        aten.index_put.default: _index_put,
        aten.masked_fill.Scalar: _masked_fill,
        aten.scatter.value: _scatter,
        aten.sort.default: _sort,
        aten.sum.dim_IntList: _sum,
        aten.topk.default: _topk,
        aten.zeros_like.default: _empty_like,
    }
)
