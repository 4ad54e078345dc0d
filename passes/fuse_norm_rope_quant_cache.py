"""Split, normalize q and k, rotate, quantize and write to NZ pages by npu_qkv_rms_norm_rope_cache.

For models that normalize q and k a head before they rotate them, as Qwen3 does, with heads of 128
and caches in NZ format (`--kv-format nz`), which is all that the op's document takes. It writes the
queries to a tensor made for them, and gives no float keys and values: such are not documented.

before:
    def lowered(
        qkv: f16[1, T, 512],
        slots: i32[T],
        cos: f16[1, T, 128],
        sin: f16[1, T, 128],
        k_cache_0: i8[N, 4, S, 32] = cache_nz(1),
        v_cache_0: i8[N, 4, S, 32] = cache_nz(1),
        qw: f16[128] = stored("qw"),
        kw: f16[128] = stored("kw"),
        ks: f32[128] = stored("ks"),
        vs: f32[128] = stored("vs"),
        vz: i32[128] = stored("vz"),
    ):
        c: f16[1, T, 1, 128] = aten.unsqueeze(cos, 2)
        s: f16[1, T, 1, 128] = aten.unsqueeze(sin, 2)
        split: (f16[1, T, 256], f16[1, T, 128], f16[1, T, 128]) = aten.split_with_sizes(qkv, [256, 128, 128], -1)
        q: f16[1, T, 256] = split[0]
        k: f16[1, T, 128] = split[1]
        v: f16[1, T, 128] = split[2]
        q_heads: f16[1, T, 2, 128] = aten.reshape(q, [1, -1, 2, 128])
        q_norm: (f16[1, T, 2, 128], f32[1, T, 2, 1]) = npu.npu_rms_norm(q_heads, qw, 1e-06)
        q_normed: f16[1, T, 2, 128] = q_norm[0]
        k_heads: f16[1, T, 1, 128] = aten.reshape(k, [1, -1, 1, 128])
        k_norm: (f16[1, T, 1, 128], f32[1, T, 1, 1]) = npu.npu_rms_norm(k_heads, kw, 1e-06)
        k_normed: f16[1, T, 1, 128] = k_norm[0]
        q_turned: f16[1, T, 2, 128] = npu.npu_rotary_mul(q_normed, c, s)
        k_turned: f16[1, T, 1, 128] = npu.npu_rotary_mul(k_normed, c, s)
        k_flat: f16[T, 128] = aten.reshape(k_turned, [-1, 128])
        k8: i8[T, 128] = npu.npu_quantize(k_flat, ks, None, 1, -1, True)
        k_rows: i8[T, 1, 128] = aten.reshape(k8, [-1, 1, 128])
        v_flat: f16[T, 128] = aten.reshape(v, [-1, 128])
        v8: i8[T, 128] = npu.npu_quantize(v_flat, vs, vz, 1, -1, True)
        v_rows: i8[T, 1, 128] = aten.reshape(v8, [-1, 1, 128])
        write: () = npu.npu_scatter_pa_kv_cache(k_rows, v_rows, k_cache_0, v_cache_0, slots, cache_mode='PA_NZ')
        return [q_turned, k_cache_0, v_cache_0]

after:
    def lowered(
        qkv: f16[1, T, 512],
        slots: i32[T],
        cos: f16[1, T, 128],
        sin: f16[1, T, 128],
        k_cache_0: i8[N, 4, S, 32] = cache_nz(1),
        v_cache_0: i8[N, 4, S, 32] = cache_nz(1),
        qw: f16[128] = stored("qw"),
        kw: f16[128] = stored("kw"),
        ks_heads: f32[1, 128] = reshape(stored("ks"), [1, 128]),
        vs_heads: f32[1, 128] = reshape(stored("vs"), [1, 128]),
        vz_heads: f32[1, 128] = cast(reshape(stored("vz"), [1, 128]), f32),
    ):
        reshape_1: f16[T, 128] = aten.reshape(cos, [-1, 128])
        reshape_2: f16[T, 128] = aten.reshape(sin, [-1, 128])
        reshape: f16[T, 512] = aten.reshape(qkv, [-1, 512])
        sym_size: int[T] = aten.sym_size.int(reshape, 0)
        new_empty: f16[T, 256] = aten.new_empty(reshape, [sym_size, 256])
        to: i64[T] = aten.to.dtype(slots, i64)
        npu_qkv_rms_norm_rope_cache: (f16[()], f16[()], f16[()]) = npu.npu_qkv_rms_norm_rope_cache(reshape, qw, kw, reshape_1, reshape_2, to, new_empty, k_cache_0, v_cache_0, [sym_size, 1, 4, 128], [2, 1, 1], epsilon=1e-06, cache_mode='PA_NZ', k_scale=ks_heads, k_offset=None, v_scale=vs_heads, v_offset=vz_heads)
        reshape_3: f16[1, T, 2, 128] = aten.reshape(new_empty, [1, -1, 2, 128])
        return [reshape_3, k_cache_0, v_cache_0]

In float32 the results are the same, bit for bit. In half precision the op rounds nothing between the
norm and the code: the separate ops round the normalized and the rotated key, by u = 2^-8 of their
size in bfloat16, so a key k rotated from n moves by up to 2u(|cos n| + |sin n'|) and its code by that
over its scale, and one. In float16 npu_rotary_mul rounds its products as well: 4u, u = 2^-11.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, argument, is_call, tensor_type, unshaped
from kvc8.passes.matchers.cache_write import (
    codes_of,
    flat_angle,
    has_angles_of_tokens,
    offset_of_heads,
    readers,
    scale_of_heads,
)
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
HEAD_DIM = 128  # "currently, only 128 is supported": CANN's document of aclnnQkvRmsNormRopeCache


@dataclass(frozen=True)
class Turned:
    """Queries or keys: a part of the split, normalized and rotated."""

    part: Node
    norm: Node
    rotary: Node

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return int(tensor_type(self.rotary).shape[2])


@dataclass(frozen=True)
class NormedWriteSite:
    """A cache write and what its rows come from."""

    write: Node
    split: Node
    q: Turned
    k: Turned
    quantize_k: Node
    quantize_v: Node


@rewrite(takes=Stage.LOWERED, gives=Stage.LOWERED, contract="real_exact")
def fuse_norm_rope_quant_cache(program: Program) -> Iterator[Remark]:
    """See the module."""
    shared: dict[Node, Node] = {}  # what all layers read: the angles, flat, and the slots in int64
    for write in program.calls(npu.npu_scatter_pa_kv_cache):
        site = _site(write)
        if isinstance(site, str):
            yield miss(write, site)
        else:
            yield hit(_fuse(program, site, shared))


def _site(write: Node) -> NormedWriteSite | str:
    """The site of a cache write, or why it is none."""
    codes = codes_of(write, "PA_NZ", "its cache is in ND format, and the op writes NZ")
    if isinstance(codes, str):
        return codes
    rows = [unshaped(argument(node, 0)) for node in codes]
    k = _turned(rows[0])
    if isinstance(k, str):
        return k
    if any(readers(row) != {code} for row, code in zip((k.rotary, rows[1]), codes, strict=True)):
        return "its float rows are read beside the cache, and the op gives none"
    return _with_queries(write, k, rows[1], codes)


def _turned(rotary: Node) -> Turned | str:
    """Where rotated keys come from, or why the op does not make such."""
    if not is_call(rotary, npu.npu_rotary_mul) or not has_angles_of_tokens(rotary):
        return "its keys do not come out of npu_rotary_mul by cosines of [1, T, 1, D]"
    normed = unshaped(argument(rotary, 0))
    norm = argument(normed, 0) if is_call(normed, getitem) else normed
    if not is_call(norm, npu.npu_rms_norm) or set(norm.users) != {normed}:
        return "its keys are not normalized before they are rotated"
    if readers(normed) != {rotary}:
        return "its normalized keys are read beside their rotation"
    part = unshaped(argument(norm, 0))
    if not is_call(part, getitem) or not is_call(argument(part, 0), ATEN.split_with_sizes.default):
        return "its q, k and v are not made by one linear"
    dim = tensor_type(rotary).shape[3]
    return (
        Turned(part, norm, rotary) if dim == HEAD_DIM else f"its heads are {dim} wide, and not 128"
    )


def _with_queries(write: Node, k: Turned, v: Node, codes: list[Node]) -> NormedWriteSite | str:
    split = argument(k.part, 0)
    items = {item.args[1]: item for item in split.users}
    if [k.part, v] != [items.get(1), items.get(2)] or 0 not in items:
        return "its q, k and v are not made by one linear"
    q = _queries(items[0])
    if q is None or q.norm.args[2] != k.norm.args[2] or q.rotary.args[1:] != k.rotary.args[1:]:
        return "its queries are not normalized and rotated as its keys are"
    if readers(k.part) != {k.norm} or tensor_type(v) != tensor_type(k.part):
        return "its keys are read before they are normalized, or are not as wide as its values"
    return NormedWriteSite(write, split, q, k, *codes)


def _queries(part: Node) -> Turned | None:
    """The queries, followed from their part of the split to their rotation."""
    found = [part]
    for op in (npu.npu_rms_norm, getitem, npu.npu_rotary_mul):
        following = readers(found[-1])
        if len(following) != 1 or not is_call(node := following.pop(), op):
            return None
        found.append(node)
    return Turned(part, found[1], found[3])


def _fuse(program: Program, site: NormedWriteSite, shared: dict[Node, Node]) -> Node:
    heads, kv_heads = site.q.heads, site.k.heads
    every = heads + 2 * kv_heads

    def call(op: object, *args: Argument, **options: Argument) -> Node:
        return program.call(site.split, op, *args, kwargs=options)  # type: ignore[arg-type]

    rows = call(ATEN.reshape.default, argument(site.split, 0), [-1, every * HEAD_DIM])
    cos, sin = (flat_angle(program, shared, site.k.rotary, i) for i in (1, 2))
    tokens = call(ATEN.sym_size.int, rows, 0)
    q_out = call(ATEN.new_empty.default, rows, [tokens, heads * HEAD_DIM])
    gammas = [argument(x.norm, 1) for x in (site.q, site.k)]
    caches = [argument(site.write, 2), argument(site.write, 3)]
    quantizers = {"k": site.quantize_k, "v": site.quantize_v}
    options: dict[str, Argument] = {"epsilon": site.k.norm.args[2], "cache_mode": "PA_NZ"}
    for name, node in quantizers.items():
        options[f"{name}_scale"] = scale_of_heads(program, node, kv_heads, HEAD_DIM)
        options[f"{name}_offset"] = offset_of_heads(program, node, kv_heads, HEAD_DIM)
    inputs = [rows, *gammas, cos, sin, _slots(program, site, shared), q_out, *caches]
    sizes: Argument = [tokens, 1, every, HEAD_DIM]
    parts: Argument = [heads, kv_heads, kv_heads]
    fused = call(npu.npu_qkv_rms_norm_rope_cache, *inputs, sizes, parts, **options)
    fused.meta["origin"] = site.write.meta.get("origin", "")
    q = call(ATEN.reshape.default, q_out, [1, -1, heads, HEAD_DIM])
    site.q.rotary.replace_all_uses_with(q)
    program.graph.erase_node(site.write)
    return fused


def _slots(program: Program, site: NormedWriteSite, shared: dict[Node, Node]) -> Node:
    """The slots in int64, which the op takes, once for all layers."""
    slots = argument(site.write, 4)
    if slots not in shared:
        shared[slots] = program.call(site.split, ATEN.to.dtype, slots, torch.int64)
        shared[slots].meta["origin"] = ""  # of no layer
    return shared[slots]
