"""Split, rotate, quantize and write to the cache in one launch, by npu_rope_quant_kvcache.

The op takes q, k and v of a token side by side, at most 4096 wide and a multiple of 64. Where they
are wider, as many query heads as fit go with k and v, and the others are made by a linear of their
own and rotated by npu_rotary_mul: three launches more, and no copies of parts.

Where q and k are normalized first, as in Qwen3 and Gemma 3, they are put side by side again with v:
two launches in the place of five. Where that is too wide for the op it is left alone, for a part of
the queries would have to be cut out and put back.

The op writes to its caches although its schema does not say so, and gives them back; what reads
them reads what it gives, so that no order is left to chance.

before:
    def lowered(
        x: f16[1, T, 64],
        slots: i32[T],
        cos: f16[1, T, 16],
        sin: f16[1, T, 16],
        k_cache_0: i8[N, S, 1, 16] = cache(),
        v_cache_0: i8[N, S, 1, 16] = cache(),
        w: f16[64, 64] = concat([stored("q"), stored("k"), stored("v")], 0),
        ks: f32[16] = stored("ks"),
        vs: f32[16] = stored("vs"),
        vz: i32[16] = stored("vz"),
    ):
        c: f16[1, T, 1, 16] = aten.unsqueeze(cos, 2)
        s: f16[1, T, 1, 16] = aten.unsqueeze(sin, 2)
        linear: f16[1, T, 64] = aten.linear(x, w)
        split: (f16[1, T, 32], f16[1, T, 16], f16[1, T, 16]) = aten.split_with_sizes(linear, [32, 16, 16], -1)
        q: f16[1, T, 32] = split[0]
        k: f16[1, T, 16] = split[1]
        v: f16[1, T, 16] = split[2]
        q_heads: f16[1, T, 2, 16] = aten.reshape(q, [1, -1, 2, 16])
        k_heads: f16[1, T, 1, 16] = aten.reshape(k, [1, -1, 1, 16])
        q_turned: f16[1, T, 2, 16] = npu.npu_rotary_mul(q_heads, c, s)
        k_turned: f16[1, T, 1, 16] = npu.npu_rotary_mul(k_heads, c, s)
        k_flat: f16[T, 16] = aten.reshape(k_turned, [-1, 16])
        k8: i8[T, 16] = npu.npu_quantize(k_flat, ks, None, 1, -1, True)
        k_rows: i8[T, 1, 16] = aten.reshape(k8, [-1, 1, 16])
        v_flat: f16[T, 16] = aten.reshape(v, [-1, 16])
        v8: i8[T, 16] = npu.npu_quantize(v_flat, vs, vz, 1, -1, True)
        v_rows: i8[T, 1, 16] = aten.reshape(v8, [-1, 1, 16])
        write: () = npu.npu_scatter_pa_kv_cache(k_rows, v_rows, k_cache_0, v_cache_0, slots, cache_mode='Norm')
        neg: i8[N, S, 1, 16] = aten.neg(k_cache_0)
        return [q_turned, neg, k_cache_0, v_cache_0]

after:
    def lowered(
        x: f16[1, T, 64],
        slots: i32[T],
        cos: f16[1, T, 16],
        sin: f16[1, T, 16],
        k_cache_0: i8[N, S, 1, 16] = cache(),
        v_cache_0: i8[N, S, 1, 16] = cache(),
        w: f16[64, 64] = concat([stored("q"), stored("k"), stored("v")], 0),
        ks_heads: f32[1, 16] = reshape(stored("ks"), [1, 16]),
        vs_heads: f32[1, 16] = reshape(stored("vs"), [1, 16]),
        vz_heads: f32[1, 16] = cast(reshape(stored("vz"), [1, 16]), f32),
    ):
        reshape_1: f16[T, 16] = aten.reshape(cos, [-1, 16])
        reshape_2: f16[T, 16] = aten.reshape(sin, [-1, 16])
        linear: f16[1, T, 64] = aten.linear(x, w)
        reshape: f16[T, 64] = aten.reshape(linear, [-1, 64])
        npu_rope_quant_kvcache: (f16[T, 2, 16], f16[0], f16[0], i8[N, S, 1, 16], i8[N, S, 1, 16]) = npu.npu_rope_quant_kvcache(reshape, reshape_1, reshape_2, k_cache_0, v_cache_0, slots, ks_heads, vs_heads, [32, 16, 16], offset_k=None, offset_v=vz_heads, kv_output=False, cache_mode='page')
        getitem: f16[T, 2, 16] = npu_rope_quant_kvcache[0]
        reshape_3: f16[1, T, 2, 16] = aten.reshape(getitem, [1, -1, 2, 16])
        getitem_1: i8[N, S, 1, 16] = npu_rope_quant_kvcache[3]
        getitem_2: i8[N, S, 1, 16] = npu_rope_quant_kvcache[4]
        neg: i8[N, S, 1, 16] = aten.neg(getitem_1)
        return [reshape_3, neg, getitem_1, getitem_2]

float16 and float32 give the same codes and queries, bit for bit. In bfloat16 the op quantizes the
rotated key before it is rounded, so a code may differ by one where that rounding crosses a middle; a
part of the queries made by a linear of its own may sum in another order.
"""

from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu
from kvc8.ir.packing import divide
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    tensor_type,
)
from kvc8.passes.matchers.cache_write import (
    flat_angle,
    offset_of_heads,
    readers,
    scale_of_heads,
)
from kvc8.passes.matchers.rope_write import CacheWriteSite, find_site
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
WIDTH, STEP = 4096, 64  # of q, k and v of a token, side by side


@rewrite(takes=Stage.LOWERED, gives=Stage.LOWERED, contract="real_exact")
def fuse_rope_quant_cache(program: Program) -> Iterator[Remark]:
    """See the module."""
    flat: dict[Node, Node] = {}
    for write in program.calls(npu.npu_scatter_pa_kv_cache):
        site = find_site(write)
        if isinstance(site, str):
            yield miss(write, site)
            continue
        heads, kv_heads, dim = site.heads
        most = _heads_that_fit(heads, kv_heads, dim)
        if not most or (site.normed and most < heads):
            yield miss(write, _too_wide((heads + 2 * kv_heads) * dim, normed=site.normed))
            continue
        yield hit(
            _fuse(program, site, most, flat), "" if most == heads else f"{most} of {heads} heads"
        )


def _too_wide(width: int, *, normed: bool) -> str:
    if normed:
        what = f"q and k are normalized, and with v {width} wide"
        return f"{what}; the op takes {WIDTH} at most, in multiples of {STEP}"
    limit = f"the op's {WIDTH} and is a multiple of {STEP}"
    return f"q, k and v are {width} wide, and no number of heads fits {limit}"


def _heads_that_fit(heads: int, kv_heads: int, dim: int) -> int:
    """How many of the query heads the op takes beside k and v."""
    fits = (n for n in range(heads, 0, -1) if _is_legal((n + 2 * kv_heads) * dim))
    return next(fits, 0)


def _is_legal(width: int) -> bool:
    return width <= WIDTH and width % STEP == 0


def _fuse(program: Program, site: CacheWriteSite, most: int, flat: dict[Node, Node]) -> Node:
    heads, kv_heads, dim = site.heads
    here = site.here
    if site.normed:
        first, rest = _side_by_side(program, site), None
    else:
        first, rest = (site.linear, None) if most == heads else _divide(program, site, most)
    rows = program.call(here, ATEN.reshape.default, first, [-1, (most + 2 * kv_heads) * dim])
    cos, sin = (flat_angle(program, flat, site.k, i) for i in (1, 2))
    caches = [argument(site.write, 2), argument(site.write, 3)]
    scales = [scale_of_heads(program, q, kv_heads, dim) for q in _quantizers(site)]
    offsets = [offset_of_heads(program, q, kv_heads, dim) for q in _quantizers(site)]
    sizes = [most * dim, kv_heads * dim, kv_heads * dim]
    floats = _float_readers(site)
    options: dict[str, Argument] = {"offset_k": offsets[0], "offset_v": offsets[1]}
    options |= {"kv_output": floats, "cache_mode": "page"}
    args: tuple[Argument, ...] = (rows, cos, sin, *caches, argument(site.write, 4), *scales, sizes)
    fused = program.call(here, npu.npu_rope_quant_kvcache, *args, kwargs=options)
    fused.meta["origin"] = site.write.meta.get("origin", "")
    _take(program, site, fused, rest, floats=floats)
    return fused


def _take(
    program: Program, site: CacheWriteSite, fused: Node, rest: Node | None, *, floats: bool
) -> None:
    """Put what the op gives where q, k, v and the caches were read."""
    heads, kv_heads, dim = site.heads

    def item(index: int, shape: list[int]) -> Node:
        made = program.call(site.here, getitem, fused, index)
        return program.call(site.here, ATEN.reshape.default, made, shape) if shape else made

    if rest is None:
        q = item(0, [1, -1, heads, dim])
    else:
        here = item(0, [1, -1, heads - int(tensor_type(rest).shape[2]), dim])
        q = program.call(site.split, ATEN.cat.default, [here, rest], 2)
    site.q.replace_all_uses_with(q)
    if floats:
        site.k.replace_all_uses_with(item(1, [1, -1, kv_heads, dim]))
        if not site.normed:  # whose values are read before they are put beside the keys
            site.v.replace_all_uses_with(item(2, [1, -1, kv_heads * dim]))
    caches = [argument(site.write, 2), argument(site.write, 3)]
    program.graph.erase_node(site.write)
    for i, cache in enumerate(caches, 3):
        cache.replace_all_uses_with(item(i, []), lambda user: user is not fused)


def _side_by_side(program: Program, site: CacheWriteSite) -> Node:
    """Normalized q and k, and v, [1, T, width]."""
    heads, kv_heads, dim = site.heads
    parts = ((argument(site.q, 0), heads), (argument(site.k, 0), kv_heads), (site.v, kv_heads))
    flat = [
        program.call(site.here, ATEN.reshape.default, part, [1, -1, count * dim])
        for part, count in parts
    ]
    return program.call(site.here, ATEN.cat.default, flat, -1)


def _quantizers(site: CacheWriteSite) -> tuple[Node, Node]:
    return site.quantize_k, site.quantize_v


def _float_readers(site: CacheWriteSite) -> bool:
    """Whether something wants the float rows, as the attention of a fresh prompt does."""
    return readers(site.k) != {site.quantize_k} or readers(site.v) != {site.quantize_v}


def _divide(program: Program, site: CacheWriteSite, most: int) -> tuple[Node, Node]:
    """The linear of what the op takes, and the rotated queries that it does not take."""
    heads, _, dim = site.heads
    first, second = divide(program, site.linear, heads * dim, most * dim)
    rows = program.call(site.split, ATEN.reshape.default, second, [1, -1, heads - most, dim])
    return first, program.call(site.split, npu.npu_rotary_mul, rows, *site.q.args[1:])
