"""Lower cache writes and paged attention to NPU ops, for one phase.

Decode (one token a sequence) reads the int8 pages: npu_fused_infer_attention_score dequantizes
inside, so no float copy of the cache is made.

Prefill (fresh prompts) attends over the prompt's own K and V: the op takes one query a sequence
where it reads int8 pages. They are the float rows, as the vendor does (`prefill_kv="float"`), or
what the cache gives back of them (`"int8"`), so that prefill and decode see the same.

before:
    def lowering(
        q: f16[T, 4, 32],
        k: f16[T, 2, 32],
        slot_mapping: i32[T],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        k_cache_0: i8[N, S, 2, 32] = cache(),
        v_cache_0: i8[N, S, 2, 32] = cache(),
        qs: f32[64] = stored("s"),
        ds: f32[64] = stored("s"),
    ):
        reshape: f16[T, 64] = aten.reshape(k, [-1, 64])
        npu_quantize: i8[T, 64] = npu.npu_quantize(reshape, qs, None, 1, -1, True)
        reshape_1: i8[T, 2, 32] = aten.reshape(npu_quantize, [-1, 2, 32])
        k_new_0: i8[N, S, 2, 32] = kvc8.cache_write(k_cache_0, reshape_1, slot_mapping)
        v_new_0: i8[N, S, 2, 32] = kvc8.cache_write(v_cache_0, reshape_1, slot_mapping)
        flatten: i8[N, S, 64] = aten.flatten.using_ints(k_new_0, 2, 3)
        npu_anti_quant: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=None, dst_dtype=5)
        unflatten: f16[N, S, 2, 32] = aten.unflatten.int(npu_anti_quant, 2, [2, 32])
        flatten_1: i8[N, S, 64] = aten.flatten.using_ints(v_new_0, 2, 3)
        npu_anti_quant_1: f16[N, S, 64] = npu.npu_anti_quant(flatten_1, ds, offset=None, dst_dtype=5)
        unflatten_1: f16[N, S, 2, 32] = aten.unflatten.int(npu_anti_quant_1, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(q, unflatten, unflatten_1, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        return [attention_0, k_new_0, v_new_0]

after:
    def lowered(
        q: f16[T, 4, 32],
        k: f16[T, 2, 32],
        slot_mapping: i32[T],
        block_table: i32[T, M],
        kv_lens: ints[T],
        k_cache_0: i8[N, S, 2, 32] = cache(),
        v_cache_0: i8[N, S, 2, 32] = cache(),
        qs: f32[64] = stored("s"),
        ds_f16: f16[64] = cast(stored("s"), f16),
        ds_f16_1: f16[64] = cast(stored("s"), f16),
    ):
        reshape: f16[T, 64] = aten.reshape(k, [-1, 64])
        npu_quantize: i8[T, 64] = npu.npu_quantize(reshape, qs, None, 1, -1, True)
        reshape_1: i8[T, 2, 32] = aten.reshape(npu_quantize, [-1, 2, 32])
        npu_scatter_pa_kv_cache_functional: (i8[N, S, 2, 32], i8[N, S, 2, 32]) = npu.npu_scatter_pa_kv_cache_functional(reshape_1, reshape_1, k_cache_0, v_cache_0, slot_mapping, cache_mode='Norm')
        getitem: i8[N, S, 2, 32] = npu_scatter_pa_kv_cache_functional[0]
        getitem_1: i8[N, S, 2, 32] = npu_scatter_pa_kv_cache_functional[1]
        reshape_2: f16[T, 1, 128] = aten.reshape(q, [-1, 1, 128])
        flatten_2: i8[N, S, 64] = aten.flatten.using_ints(getitem, 2, 3)
        flatten_3: i8[N, S, 64] = aten.flatten.using_ints(getitem_1, 2, 3)
        sym_size: int[S] = aten.sym_size.int(getitem, 1)
        npu_fused_infer_attention_score: (f16[T, 1, 128], f32[0]) = npu.npu_fused_infer_attention_score(reshape_2, flatten_2, flatten_3, actual_seq_lengths_kv=kv_lens, key_antiquant_scale=ds_f16, key_antiquant_mode=0, value_antiquant_scale=ds_f16_1, value_antiquant_mode=0, block_table=block_table, num_heads=4, scale=0.5, num_key_value_heads=2, input_layout='BSH', block_size=sym_size)
        getitem_2: f16[T, 1, 128] = npu_fused_infer_attention_score[0]
        attention_1: f16[T, 4, 32] = aten.reshape(getitem_2, [-1, 4, 32])
        return [attention_1, getitem, getitem_1]

A site is left alone, and the program then refused, where the op cannot express it: attention with
a soft cap or sinks; in decode, a window, which the op ignores for one query a sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Literal

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu, ops
from kvc8.ir.program import Program, Stage, argument, is_call, recipe_of, tensor_type
from kvc8.ir.recipe import Recipe, cast
from kvc8.ir.types import IntsType, TensorType, dtype_name, size
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
TOKENS = size("T")
PACKED_HEAD_DIMS = (128, 192)  # that the op takes end to end (TND); others go one prompt a call
MASK = 2048  # the side of the mask that sparse modes 3 and 4 take, whatever the lengths


@dataclass
class Side:
    """The K or the V of one attention: the write, and what reads it back (None: a float cache)."""

    write: Node
    back: Node | None

    @property
    def rows(self) -> Node:
        """The float rows that go into the cache."""
        codes = argument(self.write, 1)
        if self.back is None:
            return codes
        return argument(argument(argument(codes, 0), 0), 0)


@dataclass
class Site:
    """A call of paged attention, its cache written by one scatter."""

    program: Program
    node: Node
    k: Side
    v: Side

    @property
    def heads(self) -> dict[str, Argument]:
        """Heads and scale, as the op names them."""
        kv_heads, scale = tensor_type(self.k.write).shape[2], self.node.args[6]
        heads = int(tensor_type(self.node).shape[1])
        return {"num_heads": heads, "scale": scale, "num_key_value_heads": int(kv_heads)}

    def call(self, op: object, *args: Argument, **kwargs: Argument) -> Node:
        """Put a call ahead of the attention."""
        return self.program.call(self.node, op, *args, kwargs=kwargs)  # type: ignore[arg-type]


@rewrite(
    takes=Stage.LOWERING,
    gives=Stage.LOWERED,
    contract="real_exact",
    required="see the reasons",
)
def lower_paged_attention(
    program: Program,
    phase: Literal["prefill", "decode"] = "decode",
    prefill_kv: Literal["float", "int8"] = "float",
) -> Iterator[Remark]:
    """See the module."""
    for node in program.calls(ops.paged_attention):
        k, v = _side(argument(node, 1)), _side(argument(node, 2))
        why = _why_not(node, k, v, phase)
        if why or k is None or v is None:
            yield miss(node, why)
            continue
        site = Site(program, node, k, v)
        caches = _scatter(site)
        out = _decode(site, caches) if phase == "decode" else _prefill(site, prefill_kv)
        node.replace_all_uses_with(out)
        yield hit(node, f"{phase}, {'int8' if k.back else 'float'} cache")
    _drop_inputs(program, phase)


def _side(cache: Node) -> Side | None:
    if is_call(cache, ops.cache_write):
        return Side(cache, None)
    if not is_call(cache, ATEN.unflatten.int) or not is_call(
        argument(cache, 0), npu.npu_anti_quant
    ):
        return None
    back = argument(cache, 0)
    write = argument(argument(back, 0), 0)
    return Side(write, back) if is_call(write, ops.cache_write) else None


def _why_not(node: Node, k: Side | None, v: Side | None, phase: str) -> str:
    window, softcap, sinks = node.args[7:10]
    if k is None or v is None:
        return "its K and V do not come out of a cache that this program writes"
    if softcap or sinks is not None:
        return "npu_fused_infer_attention_score has no soft cap and no sinks"
    if window and phase == "decode":
        what = "npu_fused_infer_attention_score ignores a window for one query a sequence"
        return f"{what}, and this one sees {window} tokens"
    return ""


def _scatter(site: Site) -> tuple[Node, Node]:
    """Write K and V of a layer by one op; gives the caches as they then are."""
    k, v = site.k.write, site.v.write
    codes = (argument(k, 1), argument(v, 1), argument(k, 0), argument(v, 0), argument(k, 2))
    both = site.call(npu.npu_scatter_pa_kv_cache_functional, *codes, cache_mode="Norm")
    new = site.call(getitem, both, 0), site.call(getitem, both, 1)
    for old, made in zip((k, v), new, strict=True):
        # what read it until now comes earlier and dies with the attention
        old.replace_all_uses_with(made, lambda user: user.op == "output")
    return new


def _decode(site: Site, caches: tuple[Node, Node]) -> Node:
    """One query a sequence over its pages; the caches are [N, S, H*D] in layout BSH."""
    q, table = argument(site.node, 0), argument(site.node, 3)
    table.meta["type"] = TensorType(torch.int32, (TOKENS, size("M")))  # a token is a sequence
    kv_lens = _input(site.program, "kv_lens")
    rows = site.call(ATEN.reshape.default, q, [-1, 1, _width(q)])
    k, v = (site.call(ATEN.flatten.using_ints, cache, 2, 3) for cache in caches)
    block = site.call(ATEN.sym_size.int, caches[0], 1)
    options = {
        "actual_seq_lengths_kv": kv_lens,
        **_antiquant(site, "key", site.k),
        **_antiquant(site, "value", site.v),
        "block_table": table,
        **site.heads,
        "input_layout": "BSH",
        "block_size": block,
    }
    return _attend(site, rows, k, v, options)


def _antiquant(site: Site, name: str, side: Side) -> dict[str, Argument]:
    """Scale and offset of one side in the dtype of the query, [H*D]."""
    if side.back is None:
        return {}
    dtype = tensor_type(site.node).dtype
    offset = side.back.kwargs["offset"]
    made = {f"{name}_antiquant_scale": _in_dtype(site.program, argument(side.back, 1), dtype)}
    if isinstance(offset, Node):
        made[f"{name}_antiquant_offset"] = _in_dtype(site.program, offset, dtype)
    return {**made, f"{name}_antiquant_mode": 0}


def _in_dtype(program: Program, source: Node, dtype: torch.dtype) -> Node:
    if tensor_type(source).dtype is dtype:
        return source
    type_ = TensorType(dtype, tensor_type(source).shape)
    name = f"{source.name}_{dtype_name(dtype)}"
    return program.placeholder(name, type_, cast(recipe_of(source), dtype))


def _prefill(site: Site, prefill_kv: str) -> Node:
    """Each prompt over itself: end to end in layout TND, or one prompt a call in BSH."""
    q = argument(site.node, 0)
    k, v = (_seen(site, side, prefill_kv) for side in (site.k, site.v))
    packed = int(tensor_type(q).shape[2]) in PACKED_HEAD_DIMS
    options: dict[str, Argument] = {"atten_mask": _mask(site.program)}
    if packed:
        ends = _input(site.program, "query_ends")
        options |= {"actual_seq_lengths": ends, "actual_seq_lengths_kv": ends}
    else:
        q, k, v = (site.call(ATEN.reshape.default, x, [1, -1, _width(x)]) for x in (q, k, v))
    window = site.node.args[7]
    assert isinstance(window, int)
    band = {"pre_tokens": window - 1, "next_tokens": 0} if window else {}
    layout = {"input_layout": "TND" if packed else "BSH", "sparse_mode": 4 if window else 3}
    return _attend(site, q, k, v, {**options, **site.heads, **band, **layout})


def _seen(site: Site, side: Side, prefill_kv: str) -> Node:
    """The rows that a prompt sees of itself."""
    if prefill_kv == "float" or side.back is None:
        return side.rows
    codes = argument(argument(side.write, 1), 0)
    wide = site.call(npu.npu_anti_quant, codes, side.back.args[1], **side.back.kwargs)
    shape = [int(d) for d in tensor_type(side.rows).shape[1:]]
    return site.call(ATEN.reshape.default, wide, [-1, *shape])


def _attend(site: Site, q: Node, k: Node, v: Node, options: dict[str, Argument]) -> Node:
    both = site.call(npu.npu_fused_infer_attention_score, q, k, v, **options)
    out = site.call(getitem, both, 0)
    shape = [int(d) for d in tensor_type(site.node).shape[1:]]
    return site.program.call(
        site.node, ATEN.reshape.default, out, [-1, *shape], name=site.node.name
    )


def _width(x: Node) -> int:
    _, heads, dim = tensor_type(x).shape
    return int(heads) * int(dim)


def _input(program: Program, name: str) -> Node:
    """The list on the host of that name, one for all layers."""
    sequences = TOKENS if name == "kv_lens" else size("B")
    found = [node for node in program.inputs() if node.name == name]
    return found[0] if found else program.placeholder(name, IntsType(sequences))


def _mask(program: Program) -> Node:
    recipe = Recipe("masked_above", (MASK,))
    found = [n for n in program.parameters() if n.meta["recipe"] == recipe]
    type_ = TensorType(torch.bool, (MASK, MASK))
    return found[0] if found else program.placeholder("causal_mask", type_, recipe)


def _drop_inputs(program: Program, phase: str) -> None:
    """Remove the inputs that the phase has no use for."""
    program.graph.eliminate_dead_code()
    kept = ("block_table",) if phase == "decode" else ()
    for node in program.inputs():
        gone = node.name in ("block_table", "seq_lens", "query_starts") and node.name not in kept
        if gone and not node.users:  # a site left alone uses them, and verify then speaks of it
            program.graph.erase_node(node)
