"""The paged KV cache in standard ops: writing it, and attending to it.

Each sequence's query rows are padded to those of the longest, P, so that the logits are
[B, heads, P, L] for the L keys of the longest sequence: never more than a block-diagonal
[T, B*L], and B times less when decoding. Pages are gathered before they are dequantized, so that no
float copy of the whole cache is made. What is the same in each layer is written as if each made
it anew; the builder makes it once.

The op Attention is not used: opset 23 caps logits after masking them, and a key that is masked
but not a number would spoil its row.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import END, Builder, Value
from kvc8.backends.onnx.dynamic import dequantized_tokens
from kvc8.backends.onnx.quantization import dequantized
from kvc8.ir import ops
from kvc8.ir.program import argument, is_call, tensor_type

I64 = torch.int64


def cache_write(b: Builder, node: Node, cache: Value, rows: Value, slots: Value) -> Value:
    """`kvc8.cache_write`: rows whose slot is -1 are left out of what is scattered."""
    slots = b.cast(slots, tensor_type(argument(node, 2)).dtype, I64)
    real = b.op("Squeeze", b.op("NonZero", b.op("GreaterOrEqual", slots, b.number(0, I64))), [0])
    at, block = b.op("Gather", slots, real), b.size(tensor_type(node).shape[1])
    place = [b.op("Unsqueeze", b.op(kind, at, block), [1]) for kind in ("Div", "Mod")]
    picked = b.op("Gather", rows, real, axis=0)
    return b.op("ScatterND", cache, b.op("Concat", *place, axis=1), picked)


@dataclass(frozen=True)
class _Batch:
    """Which rows and keys belong to which sequence; all int64."""

    first: Value  # [B], each sequence's first row in q
    end: Value  # [B], the row after its last
    lens: Value  # [B, 1], its tokens with the new ones
    most: Value  # P, of no dimension
    step: Value  # [P]: 0, 1, ...
    block: Value  # [1], the tokens a block holds
    pages: Value  # [1], blocks of the longest sequence
    key: Value  # [L]: 0, 1, ...


def paged_attention(
    b: Builder,
    node: Node,
    q: Value,
    k_cache: Value,
    v_cache: Value,
    table: Value,
    lens: Value,
    starts: Value,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Value | None = None,
) -> Value:
    """`kvc8.paged_attention`."""
    batch = _batch(b, node, lens, starts)
    table = _table(b, node, batch, table)
    k, v = (_gathered(b, node, index, table) for index in (1, 2))
    logits = b.op("MatMul", _query(b, node, batch, q), b.op("Transpose", k, perm=[0, 2, 3, 1]))
    logits = b.op("Mul", logits, b.number(scale, _wide(node)))
    if softcap:
        cap = b.number(softcap, _wide(node))
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)
    weights = _weights(b, node, batch, logits, window, sinks)
    v = v if is_call(node.args[2], ops.dequantize) else _clean(b, node, batch, v)
    out = b.op("MatMul", weights, b.op("Transpose", v, perm=[0, 2, 1, 3]))
    return _rows(b, node, batch, out)


def _wide(node: Node) -> torch.dtype:
    """What attention is computed in: float32, or float64 where the program is."""
    return torch.promote_types(tensor_type(node).dtype, torch.float32)


def _batch(b: Builder, node: Node, lens: Value, starts: Value) -> _Batch:
    starts = b.cast(starts, tensor_type(argument(node, 5)).dtype, I64)
    lens = b.cast(lens, tensor_type(argument(node, 4)).dtype, I64)
    first, end = b.op("Slice", starts, [0], [-1], [0]), b.op("Slice", starts, [1], [END], [0])
    new = b.op("Concat", b.op("Sub", end, first), [1], axis=0)  # one row, where there are none
    most = b.op("ReduceMax", new, [0], keepdims=0)
    block = b.size(tensor_type(argument(node, 1)).shape[1])
    longest = b.op("ReduceMax", b.op("Concat", lens, [1], axis=0), [0], keepdims=1)
    pages = b.op("Div", b.op("Sub", b.op("Add", longest, block), [1]), block)
    return _Batch(
        first=first,
        end=end,
        lens=b.op("Unsqueeze", lens, [1]),
        most=most,
        step=_range(b, most),
        block=block,
        pages=pages,
        key=_range(b, b.op("Squeeze", b.op("Mul", pages, block), [0])),
    )


def _range(b: Builder, end: Value) -> Value:
    return b.op("Range", b.number(0, I64), end, b.number(1, I64))


def _table(b: Builder, node: Node, batch: _Batch, table: Value) -> Value:
    """The blocks of each sequence, [B, pages]; what lies past its end may be anything, so 0."""
    table = b.cast(table, tensor_type(argument(node, 3)).dtype, I64)
    table = b.op("Slice", table, [0], batch.pages, [1])
    at = b.op("Mul", _range(b, b.op("Squeeze", batch.pages, [0])), batch.block)
    return b.op("Where", b.op("Less", at, batch.lens), table, b.number(0, I64))


def _gathered(b: Builder, node: Node, index: int, table: Value) -> Value:
    """The keys or values of each sequence, [B, L, H, D]."""
    cache = argument(node, index)
    if is_call(cache, torch.ops.aten.cat.default):  # of caches, whose pages are joined instead
        parts = [_pages(b, node, part, table) for part in cache.args[0]]  # type: ignore
        return b.op("Concat", *parts, axis=-1)
    return _pages(b, node, cache, table)


def _pages(b: Builder, node: Node, cache: Node, table: Value) -> Value:
    """What a cache has of each sequence, [B, L, H, D]."""
    type_ = tensor_type(cache)
    if is_call(cache, ops.dequantize):
        pages = dequantized(b, cache, _rows_of(b, argument(cache, 0), table), type_.shape)
    elif is_call(cache, ops.dequantize_tokens):
        codes, steps = (_rows_of(b, argument(cache, i), table) for i in (0, 1))
        pages = dequantized_tokens(b, cache, codes, steps)
    else:
        pages = _rows_of(b, cache, table)
    return b.cast(pages, type_.dtype, _wide(node))


def _rows_of(b: Builder, cache: Node, table: Value) -> Value:
    """The pages of a cache [N, S, H, D] that a table names, as they lie there, [B, L, H, D]."""
    wanted = b.shape([0, -1, *tensor_type(cache).shape[2:]])
    return b.op("Reshape", b.op("Gather", b.value(cache), table, axis=0), wanted)


def _clean(b: Builder, node: Node, batch: _Batch, values: Value) -> Value:
    """Zero in place of what lies past a sequence's end, which may be no number; 0 * NaN is NaN."""
    valid = b.op("Unsqueeze", b.op("Less", batch.key, batch.lens), [2, 3])
    return b.op("Where", valid, values, b.number(0, _wide(node)))


def _query(b: Builder, node: Node, batch: _Batch, q: Value) -> Value:
    """The query rows of each sequence, padded: [B, H, G*P, D], G query heads to a KV head."""
    type_ = tensor_type(argument(node, 0))
    last = b.op("Sub", b.size(type_.shape[0]), [1])
    row = b.op("Min", b.op("Add", b.op("Unsqueeze", batch.first, [1]), batch.step), last)
    rows = b.op("Gather", b.cast(q, type_.dtype, _wide(node)), row, axis=0)
    heads, groups = _heads(node)
    rows = b.op("Reshape", rows, b.shape([0, 0, heads, groups, type_.shape[2]]))
    turned = b.op("Transpose", rows, perm=[0, 2, 3, 1, 4])
    return b.op("Reshape", turned, b.shape([0, 0, -1, type_.shape[2]]))


def _heads(node: Node) -> tuple[int, int]:
    """KV heads, and query heads to each."""
    heads = int(tensor_type(argument(node, 1)).shape[2])
    return heads, int(tensor_type(argument(node, 0)).shape[1]) // heads


def _seen(b: Builder, batch: _Batch, window: int) -> Value:
    """Which keys each padded row sees, bool [B, 1, 1, P, L]."""
    old = b.op("Sub", batch.lens, b.op("Unsqueeze", b.op("Sub", batch.end, batch.first), [1]))
    at = b.op("Unsqueeze", b.op("Add", old, batch.step), [1, 2, 4])
    seen = b.op("LessOrEqual", batch.key, at)
    if not window:
        return seen
    return b.op("And", seen, b.op("Greater", batch.key, b.op("Sub", at, [window])))


def _weights(
    b: Builder, node: Node, batch: _Batch, logits: Value, window: int, sinks: Value | None
) -> Value:
    """The softmax of logits [B, H, G*P, L], masked and beside the sinks."""
    heads, groups = _heads(node)
    rows = b.op("Unsqueeze", batch.most, [0])
    split = b.op("Concat", [0, 0, groups], rows, [-1], axis=0)
    masked = b.op(
        "Where",
        _seen(b, batch, window),
        b.op("Reshape", logits, split),
        b.number(float("-inf"), _wide(node)),
    )
    if sinks is None:
        weights = b.op("Softmax", masked, axis=-1)
    else:
        sinks = b.cast(sinks, tensor_type(argument(node, 9)).dtype, _wide(node))
        sinks = b.op("Reshape", sinks, [1, heads, groups, 1, 1])
        shape = b.op("Concat", b.op("Shape", masked, end=-1), [1], axis=0)
        beside = b.op("Concat", masked, b.op("Expand", sinks, shape), axis=-1)
        weights = b.op("Slice", b.op("Softmax", beside, axis=-1), [0], [-1], [4])
    return b.op("Reshape", weights, b.op("Shape", logits))


def _rows(b: Builder, node: Node, batch: _Batch, out: Value) -> Value:
    """Rows of q's order, [T, Hq, D], from [B, H, G*P, D]; those of no sequence are zeros."""
    type_ = tensor_type(node)
    groups = _heads(node)[1]
    out = b.op("Reshape", out, b.shape([0, 0, groups, -1, type_.shape[2]]))
    out = b.op("Transpose", out, perm=[0, 3, 1, 2, 4])
    out = b.op("Reshape", out, b.shape([-1, *type_.shape[1:]]))
    row = _range(b, b.op("Squeeze", b.size(type_.shape[0]), [0]))
    past = b.op("GreaterOrEqual", b.op("Unsqueeze", row, [1]), batch.end)
    seq = b.op("ReduceSum", b.cast(past, torch.bool, I64), [1], keepdims=0)
    real = b.op("Less", seq, b.op("Shape", batch.end))
    seq = b.op("Where", real, seq, b.number(0, I64))
    at = b.op(
        "Add", b.op("Mul", seq, batch.most), b.op("Sub", row, b.op("Gather", batch.first, seq))
    )
    at = b.op("Where", real, at, b.number(0, I64))
    out = b.op(
        "Where",
        b.op("Unsqueeze", real, [1, 2]),
        b.op("Gather", out, at, axis=0),
        b.number(0, _wide(node)),
    )
    return b.cast(out, _wide(node), type_.dtype)
