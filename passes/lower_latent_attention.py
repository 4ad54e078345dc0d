"""Lower attention to latents to NPU ops, for one phase.

Decode attends to the pages of latents as they are: npu_fused_infer_attention_score takes one head of
latents as K and as V, and the rotated channels of query and key beside them.

Prefill and chunks make K and V of each head again, of the latents of the prompt or of those gathered
out of the pages: the op takes up to 16 rows of a query over latents, and over K and V of heads any
number. That is what fold_latent_attention found, so a program of several rows computes as it was.

before:
    def lowering(
        q_pass: f16[1, 4, T, 16],
        q_rot: f16[1, 4, T, 8],
        latent: f16[T, 1, 32],
        k_rot: f16[T, 1, 8],
        slot_mapping: i32[T],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        latent_cache_0: f16[N, S, 1, 32] = cache(),
        rope_cache_0: f16[N, S, 1, 8] = cache(),
        kv_b_k: f16[4, 16, 32] = slice(reshape(stored("kv_b.weight"), [4, 28, 32]), 1, 0, 16),
        kv_b_v: f16[4, 32, 12] = transpose(slice(reshape(stored("kv_b.weight"), [4, 28, 32]), 1, 16, 28), 1, 2),
    ):
        latent_new_0: f16[N, S, 1, 32] = kvc8.cache_write(latent_cache_0, latent, slot_mapping)
        rope_new_0: f16[N, S, 1, 8] = kvc8.cache_write(rope_cache_0, k_rot, slot_mapping)
        keys: f16[N, S, 1, 40] = aten.cat([latent_new_0, rope_new_0], -1)
        matmul: f16[1, 4, T, 32] = aten.matmul(q_pass, kv_b_k)
        cat: f16[1, 4, T, 40] = aten.cat([matmul, q_rot], -1)
        transpose: f16[1, T, 4, 40] = aten.transpose.int(cat, 1, 2)
        q: f16[T, 4, 40] = aten.reshape(transpose, [-1, 4, 40])
        attention_1: f16[T, 4, 32] = kvc8.paged_attention(q, keys, latent_new_0, block_table, seq_lens, query_starts, 0.2, 0, 0.0, None)
        transpose_1: f16[4, T, 32] = aten.transpose.int(attention_1, 0, 1)
        matmul_1: f16[4, T, 12] = aten.matmul(transpose_1, kv_b_v)
        transpose_2: f16[T, 4, 12] = aten.transpose.int(matmul_1, 0, 1)
        return [transpose_2, latent_new_0, rope_new_0]

after:
    def lowering(
        q_pass: f16[1, 4, T, 16],
        q_rot: f16[1, 4, T, 8],
        latent: f16[T, 1, 32],
        k_rot: f16[T, 1, 8],
        slot_mapping: i32[T],
        block_table: i32[T, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        kv_lens: ints[T],
        latent_cache_0: f16[N, S, 1, 32] = cache(),
        rope_cache_0: f16[N, S, 1, 8] = cache(),
        kv_b_k: f16[4, 16, 32] = slice(reshape(stored("kv_b.weight"), [4, 28, 32]), 1, 0, 16),
        kv_b_v: f16[4, 32, 12] = transpose(slice(reshape(stored("kv_b.weight"), [4, 28, 32]), 1, 16, 28), 1, 2),
    ):
        matmul: f16[1, 4, T, 32] = aten.matmul(q_pass, kv_b_k)
        npu_scatter_pa_kv_cache_functional: (f16[N, S, 1, 32], f16[N, S, 1, 8]) = npu.npu_scatter_pa_kv_cache_functional(latent, k_rot, latent_cache_0, rope_cache_0, slot_mapping, cache_mode='Norm')
        getitem: f16[N, S, 1, 32] = npu_scatter_pa_kv_cache_functional[0]
        getitem_1: f16[N, S, 1, 8] = npu_scatter_pa_kv_cache_functional[1]
        transpose_3: f16[1, T, 4, 32] = aten.transpose.int(matmul, 1, 2)
        reshape: f16[T, 1, 128] = aten.reshape(transpose_3, [-1, 1, 128])
        transpose_4: f16[1, T, 4, 8] = aten.transpose.int(q_rot, 1, 2)
        reshape_1: f16[T, 1, 32] = aten.reshape(transpose_4, [-1, 1, 32])
        flatten: f16[N, S, 32] = aten.flatten.using_ints(getitem, 2, 3)
        flatten_1: f16[N, S, 8] = aten.flatten.using_ints(getitem_1, 2, 3)
        sym_size: int[S] = aten.sym_size.int(getitem, 1)
        npu_fused_infer_attention_score: (f16[T, 1, 128], f32[0]) = npu.npu_fused_infer_attention_score(reshape, flatten, flatten, actual_seq_lengths_kv=kv_lens, block_table=block_table, query_rope=reshape_1, key_rope=flatten_1, num_heads=4, scale=0.2, num_key_value_heads=1, input_layout='BSH', block_size=sym_size)
        getitem_2: f16[T, 1, 128] = npu_fused_infer_attention_score[0]
        attention_2: f16[T, 4, 32] = aten.reshape(getitem_2, [-1, 4, 32])
        transpose_1: f16[4, T, 32] = aten.transpose.int(attention_2, 0, 1)
        matmul_1: f16[4, T, 12] = aten.matmul(transpose_1, kv_b_v)
        transpose_2: f16[T, 4, 12] = aten.transpose.int(matmul_1, 0, 1)
        return [transpose_2, getitem, getitem_1]

Latents are float in every phase, so that nothing differs but by the order of sums.

A site is left alone where the op takes no attention to latents: in a window, with a soft cap, or
beside sinks, for which the op gives no sum. One over K and V of heads is none.
"""

from collections.abc import Iterator
from operator import getitem
from typing import Literal

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, Stage, expression_of, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.attention import (
    AttentionSite,
    CacheSide,
    all_pages,
    attended,
    causal_mask,
    end_to_end,
    gathered,
    scattered,
    width,
)
from kvc8.passes.matchers.latent import FoldedSite, find_folded
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
PACKED = 128  # channels of a head that the op takes end to end (TND) beside rotated ones
Rows = tuple[Node, Node]  # what is made of latents, and what is rotated


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_latent_attention(
    program: Program, phase: Literal["prefill", "chunk", "decode"] = "decode"
) -> Iterator[Remark]:
    """See the module."""
    shared: dict[str, Node] = {}
    for node in program.calls(ops.paged_attention):
        found = find_folded(node)
        if found is None:
            continue
        if any(node.args[7:10]):
            yield miss(
                node, "no op of the NPU attends to latents in a window, capped or with sinks"
            )
            continue
        sides = CacheSide(found.latent, None), CacheSide(found.rope, None)
        site = AttentionSite(program, node, *sides, shared)
        caches = scattered(site)
        if phase == "decode":
            node.replace_all_uses_with(_decode(site, found, caches))
        else:
            latents, keys, ends = site.k.rows, site.v.rows, "query_ends"
            if phase == "chunk":
                latents, keys = (gathered(site, cache) for cache in caches)
                ends = "kv_ends"
            found.out.replace_all_uses_with(_expanded(site, found, (latents, keys), ends))
        yield hit(node, f"{phase}, float latents")


def _decode(site: AttentionSite, found: FoldedSite, caches: Rows) -> Node:
    """One query a sequence over its pages; the caches are [N, S, channels] in layout BSH."""
    query, rope = (_by_token(site, part, 1) for part in (found.folded, found.query[1]))
    latents, keys = (site.call(ATEN.flatten.using_ints, cache, 2, 3) for cache in caches)
    options = {
        **all_pages(site),
        "query_rope": rope,
        "key_rope": keys,
        **site.heads,
        "input_layout": "BSH",
        "block_size": site.call(ATEN.sym_size.int, caches[0], 1),
    }
    return attended(site, query, latents, latents, options, site.node)[0]


def _by_token(site: AttentionSite, part: Node, *between: int) -> Node:
    """A part of the query as rows: [1, H, T, D] as [T, ..., H*D], or [T, H, D]."""
    _, heads, _, dim = tensor_type(part).shape
    turned = site.call(ATEN.transpose.int, part, 1, 2)
    last = [int(heads) * int(dim)] if between else [int(heads), int(dim)]
    return site.call(ATEN.reshape.default, turned, [-1, *between, *last])


def _expanded(site: AttentionSite, found: FoldedSite, rows: Rows, kv_ends: str) -> Node:
    """Each sequence over K and V of its heads, made of its latents."""
    heads, unrotated = (int(d) for d in tensor_type(found.for_k).shape[:2])
    k, v = _of_latents(site, found, rows[0])
    shared = site.call(ATEN.repeat.default, rows[1], [1, heads, 1])
    parts = [*(_by_token(site, part) for part in found.query), k, v, shared]
    options: dict[str, Argument] = {"atten_mask": causal_mask(site)}
    packed = unrotated == int(tensor_type(v).shape[2]) == PACKED
    if packed:
        options |= end_to_end(site, kv_ends)
    else:
        parts = [site.call(ATEN.reshape.default, x, [1, -1, width(x)]) for x in parts]
    query, rope, k, v, keys = parts
    options |= {"query_rope": rope, "key_rope": keys, **site.heads, "num_key_value_heads": heads}
    options |= {"input_layout": "TND" if packed else "BSH", "sparse_mode": 3}
    return attended(site, query, k, v, options, found.out)[0]


def _of_latents(site: AttentionSite, found: FoldedSite, latents: Node) -> Rows:
    """K without its rotated channels, [rows, H, k], and V, [rows, H, v]."""
    (heads, k, latent), (*_, v) = (tensor_type(w).shape for w in (found.for_k, found.for_v))
    weight = _whole(site, found, int(heads) * (int(k) + int(v)))
    flat = site.call(ATEN.reshape.default, latents, [-1, int(latent)])
    both = site.call(ATEN.linear.default, flat, weight)
    apart = site.call(ATEN.reshape.default, both, [-1, int(heads), int(k) + int(v)])
    parts = site.call(ATEN.split_with_sizes.default, apart, [int(k), int(v)], -1)
    return site.call(getitem, parts, 0), site.call(getitem, parts, 1)


def _whole(site: AttentionSite, found: FoldedSite, rows: int) -> Node:
    """The weight that was folded, [rows, L]: of each head the rows for K, then those for V."""
    sliced = expression_of(found.for_k)
    apart = sliced.args[0]
    assert sliced.op == "slice"
    assert isinstance(apart, Expression)
    whole = apart.args[0]
    assert isinstance(whole, Expression)
    type_ = tensor_type(found.for_k)
    name = found.for_k.name.removesuffix("_k")
    full = TensorType(type_.dtype, (rows, type_.shape[2]))
    return site.program.placeholder(f"{name}_weight", full, whole)
