"""The flavor `gqa`: attention by com.microsoft.GroupQueryAttention, over a dense int8 cache.

It is what ONNX Runtime runs fastest on a CPU. Instead of flat tokens and pages, a step takes

    input_ids, positions  i64[B, P]   the new tokens of each sequence, padded to P at their right
    query_lens            i32[B]      how many of them are tokens; 0 where a sequence rests
    seq_lens              i32[B]      tokens of each sequence with the new ones; 1 where it rests
    logits_rows           i64[R]      rows of the flattened [B*P] whose logits are wanted
    <cache>               i8[B, kv_heads, L, head_dim]   room for L tokens of each sequence

seq_lens - query_lens + P must not exceed L. A row that rests with seq_lens 1 loses what its cache
held; give its own length to keep that.

The op quantizes what it writes by clamp(round(x/s)), and multiplies by s when it reads: kvc8's
arithmetic without zero points, one scale a channel. So an asymmetric cache is refused. A cache of
which the checkpoint has no scale stays float.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import Attribute, Builder, Value, typed
from kvc8.backends.onnx.fusions import linear_to_float, rms_norm, rotary
from kvc8.backends.onnx.lowerings import LOWERINGS as STANDARD
from kvc8.backends.onnx.lowerings import Lowering
from kvc8.ir import ops
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, argument, is_cache, is_call, tensor_type, users
from kvc8.ir.shapes import Op
from kvc8.ir.types import TensorType, size

DOMAIN = "com.microsoft"
I32, I64 = torch.int32, torch.int64
SEQUENCES, ROWS, ROOM, TOKENS = size("B"), size("P"), size("L"), size("T")
PAGED = ("slot_mapping", "block_table")  # inputs that a dense cache has no use for


def inputs(program: Program, b: Builder) -> list[Value]:
    """Make the inputs and caches of a program values; gives the inputs of the model.

    Raises TargetError where the program does with its caches what this flavor cannot.
    """
    _check(program)
    given = []
    for node in program.inputs():
        b.scope = node.name
        given += _input(b, node)
    for node in program.caches():
        b.values[node] = b.input(node.name, _dense(node))
    return [*given, *(b.value(node) for node in program.caches())]


def _dense(cache: Node) -> TensorType:
    """The type of a cache in this flavor."""
    type_ = tensor_type(cache)
    return TensorType(type_.dtype, (SEQUENCES, type_.shape[2], ROOM, type_.shape[3]))


def _input(b: Builder, node: Node) -> list[Value]:
    type_ = tensor_type(node)
    b.values[node] = None
    if node.name in PAGED:
        return []
    if node.name == "query_starts":  # the rows of each sequence lie padded, not end to end
        given = b.values[node] = b.input("query_lens", TensorType(I32, (SEQUENCES,)))
        return [given]
    if type_.shape != (TOKENS,):
        given = b.values[node] = b.input(node.name, type_)
        return [given]
    given = b.input(node.name, TensorType(type_.dtype, (SEQUENCES, ROWS)))
    flat = b.values[node] = b.op("Reshape", given, [-1])
    b.name_sizes(flat, type_)
    return [given]


@dataclass(frozen=True)
class _Side:
    """The K or the V of an attention: its cache, the write, the rows, and the scale, if int8."""

    cache: Node
    write: Node
    rows: Node
    scale: Node | None


def _check(program: Program) -> None:
    for back in program.calls(ops.dequantize_tokens):
        what = "has a scale a token, and the int8 cache of GroupQueryAttention one a channel"
        raise TargetError(argument(back, 0).name, what, "compile with --flavor standard")
    for write in program.calls(ops.cache_write):
        readers = [back for back in users(write) if is_call(back, ops.dequantize)]
        rest = [user for user in users(write) if user not in readers]
        found = [*rest, *(user for back in readers for user in users(back))]
        if len(found) != 1 or not is_call(found[0], ops.paged_attention):
            what = "is not read by one attention, which is what GroupQueryAttention does"
            raise TargetError(write.name, what, "compile with --flavor standard")


def _side(node: Node, index: int) -> _Side:
    cache, scale = argument(node, index), None
    if is_call(cache, ops.dequantize):
        scale = argument(cache, 1)
        if cache.args[2] is not None:
            what = "has zero points, and the int8 cache of GroupQueryAttention has none"
            raise TargetError(argument(cache, 0).name, what, "compile with --flavor standard")
        cache = argument(cache, 0)
    write = cache
    if not is_call(write, ops.cache_write) or not is_cache(argument(write, 0)):
        what = "attends to a cache that it does not write"
        raise TargetError(node.name, what, "compile with --flavor standard")
    rows = argument(write, 1)
    if scale is not None:
        if not is_call(rows, ops.quantize) or rows.args[1:] != (scale, None):
            what = "is written with another scale than it is read with"
            raise TargetError(write.name, what, "compile with --flavor standard")
        rows = argument(rows, 0)
    return _Side(argument(write, 0), write, rows, scale)


def _later(b: Builder, node: Node, *_: object, **__: object) -> None:
    """What the attention does itself; it then gives the cache as it is, too."""


def paged_attention(
    b: Builder,
    node: Node,
    q: Value,
    k: None,
    v: None,
    table: None,
    lens: Value,
    query_lens: Value,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Value | None = None,
) -> Value:
    """`kvc8.paged_attention`, with the quantizing, writing and dequantizing of its cache."""
    sides = _side(node, 1), _side(node, 2)
    past_lens, most = _lengths(b, lens)
    rows = [_padded(b, argument(node, 0)), *(_padded(b, side.rows) for side in sides)]
    caches = [b.value(side.cache) for side in sides]
    scales = [_per_channel(b, side.scale) for side in sides]
    none = (None,) * 4  # the program has turned and normalized Q and K itself
    made = (*rows, *caches, past_lens, most, *none, sinks, *scales, *none[:2], query_lens)
    out, *new = b.call(DOMAIN, "GroupQueryAttention", *made, outputs=3, **_attributes(node, sides))
    for side, cache in zip(sides, new, strict=True):
        b.values[side.write] = typed(cache, _dense(side.cache))
    return b.op("Reshape", out, b.shape([-1, *tensor_type(node).shape[1:]]))


def _attributes(node: Node, sides: tuple[_Side, _Side]) -> Mapping[str, Attribute]:
    scale, window, softcap = node.args[6:9]
    kinds = ["PER_CHANNEL" if side.scale else "NONE" for side in sides]
    assert isinstance(scale, float)
    assert isinstance(window, int)
    assert isinstance(softcap, float | int)
    found: dict[str, Attribute] = {
        "num_heads": int(tensor_type(node).shape[1]),
        "kv_num_heads": int(tensor_type(sides[0].cache).shape[2]),
        "scale": scale,
        "local_window_size": window or -1,
        "softcap": float(softcap),
        "k_quant_type": kinds[0],
        "v_quant_type": kinds[1],
    }
    return {**found, "kv_cache_bit_width": 8} if "PER_CHANNEL" in kinds else found


def _padded(b: Builder, rows: Node) -> Value:
    """Flat rows [T, heads, dim] as the op takes them, [B, P, heads*dim]."""
    shape = b.op("Concat", b.size(SEQUENCES), b.size(ROWS), [-1], axis=0)
    return b.op("Reshape", b.value(rows), shape)


def _per_channel(b: Builder, scale: Node | None) -> Value | None:
    if scale is None:
        return None
    heads, dim = tensor_type(scale).shape
    return b.op("Reshape", b.value(scale), [1, int(heads), 1, int(dim)])


def _lengths(b: Builder, lens: Value) -> tuple[Value, Value]:
    """seqlens_k, which is one less than each length, and total_sequence_length.

    The latter bounds the lengths from above, and must not be less than the padded rows.
    """
    longest = b.op("ReduceMax", lens, [0], keepdims=0)
    rows = b.op("Squeeze", b.cast(b.size(ROWS), I64, I32), [0])
    return b.op("Sub", lens, b.number(1, I32)), b.op("Max", longest, rows)


def _mul(b: Builder, node: Node, *args: object, **kwargs: object) -> object:
    return rms_norm(b, node) or STANDARD[torch.ops.aten.mul.Tensor](b, node, *args, **kwargs)


def _add(b: Builder, node: Node, *args: object, **kwargs: object) -> object:
    return rotary(b, node) or STANDARD[torch.ops.aten.add.Tensor](b, node, *args, **kwargs)


LOWERINGS: Mapping[Op, Lowering] = MappingProxyType(
    {
        **STANDARD,
        torch.ops.aten.add.Tensor: _add,
        torch.ops.aten.mul.Tensor: _mul,
        ops.cache_write: _later,
        ops.dequantize: _later,
        ops.paged_attention: paged_attention,
        ops.quant_linear: linear_to_float,
    }
)
