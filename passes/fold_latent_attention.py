"""Cache the latent that K and V of all heads are made of, and fold its weights into query and output.

With c the latent of a token, normed, and r the rotated channels that all heads share, a head has
K = [U c, r] and V = W c, where U and W are its rows of one weight. So

    q·K = [q1, q2]·[U c, r] = (U^T q1)·c + q2·r        and        sum p V = W (sum p c)

for any weights p, as a softmax with sinks, a window or a cap gives them. One row a token of as many
channels as c and r have takes the place of K and V of each head: the attention is that of all heads
over one, whose V is the first part of its K. (DeepSeek-V2, arXiv 2405.04434, section 2.1.2.)

before:
    def captured(
        q_pass: f16[1, 4, T, 16],
        q_rot: f16[1, 4, T, 8],
        latent: f16[1, 1, T, 32],
        k_rot: f16[1, 1, T, 8],
        slot_mapping: i32[T],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        k_cache_0: f16[N, S, 4, 24] = cache(),
        v_cache_0: f16[N, S, 4, 12] = cache(),
        kv_b_weight: f16[112, 32] = stored("kv_b.weight"),
    ):
        linear: f16[1, 1, T, 112] = aten.linear(latent, kv_b_weight)
        reshape: f16[1, T, 4, 28] = aten.reshape(linear, [1, -1, 4, 28])
        transpose: f16[1, 4, T, 28] = aten.transpose.int(reshape, 1, 2)
        split_with_sizes: (f16[1, 4, T, 16], f16[1, 4, T, 12]) = aten.split_with_sizes(transpose, [16, 12], -1)
        k_pass: f16[1, 4, T, 16] = split_with_sizes[0]
        getitem: f16[1, 4, T, 12] = split_with_sizes[1]
        expand: f16[1, 4, T, 8] = aten.expand(k_rot, [-1, 4, -1, -1])
        cat: f16[1, 4, T, 24] = aten.cat([k_pass, expand], 3)
        cat_1: f16[1, 4, T, 24] = aten.cat([q_pass, q_rot], -1)
        transpose_1: f16[1, T, 4, 24] = aten.transpose.int(cat_1, 1, 2)
        q: f16[T, 4, 24] = aten.reshape(transpose_1, [-1, 4, 24])
        transpose_2: f16[1, T, 4, 24] = aten.transpose.int(cat, 1, 2)
        k: f16[T, 4, 24] = aten.reshape(transpose_2, [-1, 4, 24])
        transpose_3: f16[1, T, 4, 12] = aten.transpose.int(getitem, 1, 2)
        v: f16[T, 4, 12] = aten.reshape(transpose_3, [-1, 4, 12])
        k_new_0: f16[N, S, 4, 24] = kvc8.cache_write(k_cache_0, k, slot_mapping)
        v_new_0: f16[N, S, 4, 12] = kvc8.cache_write(v_cache_0, v, slot_mapping)
        attention_0: f16[T, 4, 12] = kvc8.paged_attention(q, k_new_0, v_new_0, block_table, seq_lens, query_starts, 0.2, 0, 0.0, None)
        return [attention_0, k_new_0, v_new_0]

after:
    def captured(
        q_pass: f16[1, 4, T, 16],
        q_rot: f16[1, 4, T, 8],
        latent: f16[1, 1, T, 32],
        k_rot: f16[1, 1, T, 8],
        slot_mapping: i32[T],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        latent_cache_0: f16[N, S, 1, 32] = cache(),
        rope_cache_0: f16[N, S, 1, 8] = cache(),
        kv_b_k: f16[4, 16, 32] = slice(reshape(stored("kv_b.weight"), [4, 28, 32]), 1, 0, 16),
        kv_b_v: f16[4, 32, 12] = transpose(slice(reshape(stored("kv_b.weight"), [4, 28, 32]), 1, 16, 28), 1, 2),
    ):
        reshape_1: f16[T, 1, 32] = aten.reshape(latent, [-1, 1, 32])
        latent_new_0: f16[N, S, 1, 32] = kvc8.cache_write(latent_cache_0, reshape_1, slot_mapping)
        reshape_2: f16[T, 1, 8] = aten.reshape(k_rot, [-1, 1, 8])
        rope_new_0: f16[N, S, 1, 8] = kvc8.cache_write(rope_cache_0, reshape_2, slot_mapping)
        cat_2: f16[N, S, 1, 40] = aten.cat([latent_new_0, rope_new_0], -1)
        matmul: f16[1, 4, T, 32] = aten.matmul(q_pass, kv_b_k)
        cat_3: f16[1, 4, T, 40] = aten.cat([matmul, q_rot], -1)
        transpose_4: f16[1, T, 4, 40] = aten.transpose.int(cat_3, 1, 2)
        reshape_3: f16[T, 4, 40] = aten.reshape(transpose_4, [-1, 4, 40])
        attention_1: f16[T, 4, 32] = kvc8.paged_attention(reshape_3, cat_2, latent_new_0, block_table, seq_lens, query_starts, 0.2, 0, 0.0, None)
        transpose_5: f16[4, T, 32] = aten.transpose.int(attention_1, 0, 1)
        matmul_1: f16[4, T, 12] = aten.matmul(transpose_5, kv_b_v)
        transpose_6: f16[T, 4, 12] = aten.transpose.int(matmul_1, 0, 1)
        return [transpose_6, latent_new_0, rope_new_0]

The scale is what it was: that of the channels that K had. Exact algebra, in other sums: a logit is
summed over the channels of the latent and not over those of a head, so floats round elsewhere. What
is cached is what was made of the latent before, so the caches are others.

A site is an attention whose heads share channels of K; the graph decides, whatever the model is
called. It is left alone where K and V are not made of one latent by one linear, where that has a
bias, where the checkpoint has scales for K and V of each head, where something else reads the
cache, and where the query is not cut where K is.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, Stage, argument, expression_of, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.latent import ExpandedSite, find_expanded
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten


@rewrite(takes=Stage.CAPTURED, gives=Stage.CAPTURED, contract="real_exact")
def fold_latent_attention(program: Program) -> Iterator[Remark]:
    """See the module."""
    for attention in program.calls(ops.paged_attention):
        site = find_expanded(attention)
        if site is None:
            continue
        if isinstance(site, str):
            yield miss(attention, site)
            continue
        latent, shared = _cached(program, site)
        keys = program.call(attention, ATEN.cat.default, [latent, shared], -1)
        for_k, for_v = _weights(program, site)
        query = _query(program, site, for_k)
        over = (query, keys, latent, *attention.args[3:])
        made = program.call(attention, ops.paged_attention, *over, name=attention.name)
        attention.replace_all_uses_with(_by_head(program, attention, made, for_v))
        _drop(program, site)
        yield hit(made, _said(site))


def _said(site: ExpandedSite) -> str:
    heads, k, v, latent = site.sizes
    shared = int(tensor_type(site.shared).shape[-1])
    return f"a row of {latent} + {shared} channels for {heads} heads of {k + shared} + {v}"


def _cached(program: Program, site: ExpandedSite) -> tuple[Node, Node]:
    """Cache the latent where K was, and the shared channels where V was."""
    made = []
    pairs = zip(site.writes, ("latent", "rope"), (site.latent, site.shared), strict=True)
    for write, name, value in pairs:
        old, width = argument(write, 0), int(tensor_type(value).shape[-1])
        blocks, block, *_ = tensor_type(old).shape
        type_ = TensorType(tensor_type(old).dtype, (blocks, block, 1, width))
        named = old.name.partition("_")[2]
        cache = program.placeholder(f"{name}_{named}", type_, Expression("cache"), before=old)
        rows = program.call(write, ATEN.reshape.default, value, [-1, 1, width])
        new = write.name.partition("_")[2]
        call = program.call(
            write, ops.cache_write, cache, rows, write.args[2], name=f"{name}_{new}"
        )
        write.replace_all_uses_with(call, lambda user: user.op == "output")
        made.append(call)
    return made[0], made[1]


def _weights(program: Program, site: ExpandedSite) -> tuple[Node, Node]:
    """Of each head the weight for K, [heads, k, L], and the transpose of that for V, [heads, L, v]."""
    heads, k, v, latent = site.sizes
    whole, dtype = expression_of(site.weight), tensor_type(site.weight).dtype
    apart = Expression("reshape", (whole, (heads, k + v, latent)))
    for_k = Expression("slice", (apart, 1, 0, k))
    for_v = Expression("transpose", (Expression("slice", (apart, 1, k, k + v)), 1, 2))
    name = site.weight.name.removesuffix("_weight")
    return (
        program.placeholder(f"{name}_k", TensorType(dtype, (heads, k, latent)), for_k),
        program.placeholder(f"{name}_v", TensorType(dtype, (heads, latent, v)), for_v),
    )


def _query(program: Program, site: ExpandedSite, weight: Node) -> Node:
    """The query of each head over the latent and the shared channels, [T, heads, L + R]."""
    at, (unrotated, rotated) = site.attention, site.query
    folded = program.call(at, ATEN.matmul.default, unrotated, weight)
    both = program.call(at, ATEN.cat.default, [folded, rotated], -1)
    turned = program.call(at, ATEN.transpose.int, both, 1, 2)
    shape = [-1, *(int(d) for d in tensor_type(turned).shape[2:])]
    return program.call(at, ATEN.reshape.default, turned, shape)


def _by_head(program: Program, attention: Node, made: Node, weight: Node) -> Node:
    """V of each head, [T, heads, v], of the latents that it attended to, [T, heads, L]."""
    by_head = program.call(attention, ATEN.transpose.int, made, 0, 1)
    out = program.call(attention, ATEN.matmul.default, by_head, weight)
    return program.call(attention, ATEN.transpose.int, out, 0, 1)


def _drop(program: Program, site: ExpandedSite) -> None:
    """Remove the attention over K and V, and their caches, which no one reads any more."""
    caches = [argument(write, 0) for write in site.writes]
    for node in (site.attention, *site.writes, *caches):
        program.graph.erase_node(node)
