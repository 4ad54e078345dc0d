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
from kvc8.ir import ops
from kvc8.ir.errors import TargetError
from kvc8.ir.program import argument, is_call, tensor_type
from kvc8.ir.shapes import Op
from kvc8.ir.types import Dim

I64 = torch.int64
aten = torch.ops.aten


def _grouped_linear(b: Builder, node: Node, x: Value, weight: Value, ends: Value) -> Value:
    """`kvc8.grouped_linear`; rows past the last end are zeros."""
    ends = b.cast(ends, tensor_type(argument(node, 2)).dtype, I64)
    type_ = tensor_type(argument(node, 1))
    start, parts = b.shape([0]), []
    for expert in range(int(type_.shape[0])):
        end = b.op("Slice", ends, [expert], [expert + 1], [0])
        rows = b.op("Slice", x, start, end, [0])
        parts.append(b.op("MatMul", rows, b.op("Gather", weight, expert, axis=0)))
        start = end
    left = b.op("Sub", b.op("Shape", x, start=0, end=1), start)
    shape = b.op("Concat", left, b.shape([type_.shape[2]]), axis=0)
    rest = b.op("Expand", b.number(0, tensor_type(node).dtype), shape)
    return b.op("Concat", *parts, rest, axis=0)


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


def _sum(
    b: Builder, node: Node, x: Value, dims: list[int], keepdim: bool = False, **_: object
) -> Value:
    x = b.cast(x, tensor_type(argument(node, 0)).dtype, tensor_type(node).dtype)
    return b.op("ReduceSum", x, dims, keepdims=int(keepdim))


MIXTURES: Mapping[Op, Callable[..., object]] = MappingProxyType(
    {
        ops.grouped_linear: _grouped_linear,
        aten.arange.default: _arange,
        aten.cumsum.default: _cumsum,
        aten.empty_like.default: _empty_like,
        aten.floor_divide.default: _floor_divide,
        aten.histc.default: _histc,
        aten.index_put.default: _index_put,
        aten.sort.default: _sort,
        aten.sum.dim_IntList: _sum,
        aten.topk.default: _topk,
    }
)
