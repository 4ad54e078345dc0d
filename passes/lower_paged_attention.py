"""Lower cache writes and paged attention to NPU ops, for one phase.

Decode (one token a sequence) reads the int8 pages: npu_fused_infer_attention_score dequantizes
inside, so no float copy of the cache is made. For one query a sequence the op ignores a window, so
one is passed as a table of only the blocks that the window touches, and a mask that hides the
tokens of the first of them that come before it.

Prefill (fresh prompts) attends over the prompt's own K and V: the op takes one query a sequence
where it reads int8 pages. They are the float rows, as the vendor does (`prefill_kv="float"`), or
what the cache gives back of them (`"int8"`), so that prefill and decode see the same.

A chunk (several tokens of a sequence that has a past: the later chunks of a prompt, or a prompt
whose beginning was found in the cache) gathers the int8 rows of its sequences out of the pages, its
own among them, and attends over what the cache gives back of them. Any mixture of sequences may
share such a call, those without a past and those with one new token too.

Where tokens bring scales of their own (passes/insert_token_quant.py), those are written by a second
scatter, and decode reads them out of their pages; a chunk gathers them as it does the codes.

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
        npu_fused_infer_attention_score: (f16[T, 1, 128], f32[0]) = npu.npu_fused_infer_attention_score(reshape_2, flatten_2, flatten_3, actual_seq_lengths_kv=kv_lens, block_table=block_table, key_antiquant_scale=ds_f16, key_antiquant_mode=0, value_antiquant_scale=ds_f16_1, value_antiquant_mode=0, num_heads=4, scale=0.5, num_key_value_heads=2, input_layout='BSH', block_size=sym_size)
        getitem_2: f16[T, 1, 128] = npu_fused_infer_attention_score[0]
        attention_1: f16[T, 4, 32] = aten.reshape(getitem_2, [-1, 4, 32])
        return [attention_1, getitem, getitem_1]

Bound: real_exact, but for a prefill that attends to the float rows of an int8 cache. Those differ
from what the cache gives back by dk and dv. With g the most that dk moves a logit, scale*sum|q dk|,
a weight moves by a factor of at most e^(2g), and the output by at most max|dv| + (e^(2g) - 1)max|v|.

Sinks are one more logit a head: the op gives the logarithm of the sums that it divided by, and the
result is multiplied by what it should have divided by (passes/matchers/sinks.py).

A site is left alone, and the program then refused, where no op can express it: a soft cap. What
lower_latent_attention made of others is as it should be.
"""

from collections.abc import Iterator
from operator import getitem
from typing import Literal

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu, ops
from kvc8.ir.program import Program, Stage, argument, tensor_type
from kvc8.ir.types import IntsType, TensorType, size
from kvc8.passes.matchers.attention import (
    TOKENS,
    AttentionSite,
    CacheSide,
    all_pages,
    attended,
    causal_mask,
    dequantized,
    end_to_end,
    find_side,
    gathered,
    in_dtype,
    scattered,
    scattered_steps,
    width,
)
from kvc8.passes.matchers.float_rows import bound
from kvc8.passes.matchers.sinks import beside_sinks
from kvc8.passes.rewrite import Remark, hit, keep, miss, rewrite

ATEN = torch.ops.aten
Steps = tuple[Node | None, Node | None]  # the scales of tokens of K and V
TOKENS_IN_PAGES = 4  # the antiquant mode
PACKED_HEAD_DIMS = (128, 192)  # that the op takes end to end (TND); others go one prompt a call
NO_SOFT_CAP = (
    "it caps its logits, which no attention op of the NPU does, and in other ops each step would "
    "make float copies of all pages"
)
# What captured programs take of the batch, and lowered ones but for the table in decode do not.
OF_THE_BATCH = ("block_table", "seq_lens", "query_starts")


@rewrite(
    takes=Stage.LOWERING,
    gives=Stage.LOWERED,
    contract="real_exact",
    required="see the reasons",
    bound=bound,
)
def lower_paged_attention(
    program: Program,
    phase: Literal["prefill", "chunk", "decode"] = "decode",
    prefill_kv: Literal["float", "int8"] = "float",
) -> Iterator[Remark]:
    """See the module."""
    shared: dict[str, Node] = {}
    for node in program.calls(npu.npu_fused_infer_attention_score):
        yield keep(node, "an op of the NPU attends there already")
    for node in program.calls(ops.paged_attention):
        k, v = find_side(argument(node, 1)), find_side(argument(node, 2))
        why = _why_not(node, k, v, own=phase == "prefill" and prefill_kv == "float")
        if why or k is None or v is None:
            yield miss(node, why)
            continue
        site = AttentionSite(program, node, k, v, shared)
        caches, steps = scattered(site), scattered_steps(site)
        if phase == "decode":
            out = _decode(site, caches, steps)
        elif phase == "chunk":
            out = _chunk(site, caches, steps)
        else:
            out = _prefill(site, prefill_kv)
        node.replace_all_uses_with(out)
        of = "float" if k.back is None else "int8" if k.steps is None else "int8, a scale a token,"
        yield hit(node, f"{phase}, {of} cache")
    _drop_inputs(program)


def _why_not(node: Node, k: CacheSide | None, v: CacheSide | None, *, own: bool) -> str:
    if k is None or v is None:
        return "its K and V do not come out of a cache that this program writes"
    if not own and any(map(_smoothed, (k, v))):
        return "its channels were smoothed, which fold_token_smoothing takes out of its cache"
    return NO_SOFT_CAP if node.args[8] else ""


def _smoothed(side: CacheSide) -> bool:
    return side.steps is not None and side.back is not None and side.back.args[2] is not None


def _decode(site: AttentionSite, caches: tuple[Node, Node], steps: Steps) -> Node:
    """One query a sequence over its pages; the caches are [N, S, H*D] in layout BSH."""
    rows = site.call(ATEN.reshape.default, argument(site.node, 0), [-1, 1, width(site.node)])
    k, v = (site.call(ATEN.flatten.using_ints, cache, 2, 3) for cache in caches)
    block = site.call(ATEN.sym_size.int, caches[0], 1)
    options = {
        **(_in_window(site) if site.window else all_pages(site)),
        **_antiquant(site, "key", site.k, steps[0]),
        **_antiquant(site, "value", site.v, steps[1]),
        **site.heads,
        "input_layout": "BSH",
        "block_size": block,
    }
    return _attend(site, rows, k, v, options)


def _in_window(site: AttentionSite) -> dict[str, Argument]:
    """The same of the blocks that a window touches, and what they hold that it does not see."""
    window = site.window
    blocks, slots = size(f"M{window}"), size(f"M{window}") * size("S")
    table = TensorType(torch.int32, (TOKENS, blocks))
    hidden = TensorType(torch.bool, (TOKENS, 1, 1, slots))
    return {
        "actual_seq_lengths_kv": site.input(f"window_{window}_lens", IntsType(TOKENS)),
        "block_table": site.input(f"window_{window}_table", table),
        "atten_mask": site.input(f"window_{window}_hidden", hidden),
    }


def _antiquant(
    site: AttentionSite, name: str, side: CacheSide, steps: Node | None
) -> dict[str, Argument]:
    """Scale and offset of one side in the dtype of the query, [H*D]; or the scales of its tokens.

    Those are float32 [N, S], in pages as the codes are (ops-transformer
    aclnnFusedInferAttentionScoreV3.md, on Q_S = 1).
    """
    if side.back is None:
        return {}
    if steps is not None:
        paged = site.call(ATEN.flatten.using_ints, steps, 1, 3)
        return {f"{name}_antiquant_scale": paged, f"{name}_antiquant_mode": TOKENS_IN_PAGES}
    dtype = tensor_type(site.node).dtype
    offset = side.back.kwargs["offset"]
    made = {f"{name}_antiquant_scale": in_dtype(site.program, argument(side.back, 1), dtype)}
    if isinstance(offset, Node):
        made[f"{name}_antiquant_offset"] = in_dtype(site.program, offset, dtype)
    return {**made, f"{name}_antiquant_mode": 0}


def _prefill(site: AttentionSite, prefill_kv: str) -> Node:
    """Each prompt over itself, as float rows or as what the cache gives back of them."""
    k, v = (_seen(site, side, prefill_kv) for side in (site.k, site.v))
    return _several_rows(site, k, v, "query_ends")


def _seen(site: AttentionSite, side: CacheSide, prefill_kv: str) -> Node:
    """The new rows of one side, [T, heads, head_dim]."""
    if prefill_kv == "float":
        return side.rows
    steps = argument(side.steps, 1) if side.steps is not None else None
    return dequantized(site, side, argument(side.write, 1), steps)


def _chunk(site: AttentionSite, caches: tuple[Node, Node], steps: Steps) -> Node:
    """The new tokens of each sequence over all its tokens, gathered out of the pages."""
    k, v = (
        dequantized(site, side, gathered(site, cache), step and gathered(site, step))
        for cache, side, step in zip(caches, (site.k, site.v), steps, strict=True)
    )
    return _several_rows(site, k, v, "kv_ends")


def _several_rows(site: AttentionSite, k: Node, v: Node, kv_ends: str) -> Node:
    """Sequences end to end in layout TND, or one a call in BSH; the last row sees the last key."""
    q, window = argument(site.node, 0), site.window
    packed = int(tensor_type(q).shape[2]) in PACKED_HEAD_DIMS
    options: dict[str, Argument] = {"atten_mask": causal_mask(site)}
    if packed:
        options |= end_to_end(site, kv_ends)
    else:
        q, k, v = (site.call(ATEN.reshape.default, x, [1, -1, width(x)]) for x in (q, k, v))
    band = {"pre_tokens": window - 1, "next_tokens": 0} if window else {}
    layout = {"input_layout": "TND" if packed else "BSH", "sparse_mode": 4 if window else 3}
    return _attend(site, q, k, v, {**options, **site.heads, **band, **layout})


def _attend(site: AttentionSite, q: Node, k: Node, v: Node, options: dict[str, Argument]) -> Node:
    if site.sinks:
        options = {**options, "softmax_lse_flag": True}
    rows, both = attended(site, q, k, v, options, site.node)
    return beside_sinks(site, rows, site.call(getitem, both, 1)) if site.sinks else rows


def _drop_inputs(program: Program) -> None:
    """Remove the inputs that the phase has no use for."""
    program.drop_dead_calls()
    for node in program.inputs():
        # a site left alone uses them, and verify then speaks of it
        if node.name in OF_THE_BATCH and not node.users:
            program.graph.erase_node(node)
