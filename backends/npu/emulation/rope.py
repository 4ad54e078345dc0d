"""Rotary embeddings, and the ops that rotate, quantize and write to an int8 cache, on a CPU.

float32 is taken wherever float16 and bfloat16 are: an extension of kvc8, not legal on a device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.cache import write_rows, write_rows_nz
from kvc8.backends.npu.emulation.norm import reciprocal_deviation
from kvc8.backends.npu.emulation.quantization import refuse, require_float, saturate
from kvc8.ir.errors import TargetError

_HEAD_DIMS = (64, 128)


def rotate(x: Tensor, mode: str = "half") -> Tensor:
    """What the sine multiplies: (-x[D/2:], x[:D/2]), or interleaved (-x[1], x[0], -x[3], ...)."""
    if mode == "half":
        low, high = x.chunk(2, -1)
        return torch.cat([-high, low], -1)
    if mode != "interleave":
        raise TargetError("rotary embedding", f"mode {mode} is not known", "use half or interleave")
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([-odd, even], -1).flatten(-2)


def embed(x: Tensor, cos: Tensor, sin: Tensor, mode: str = "half") -> Tensor:
    """Rotate: x * cos + rotate(x) * sin, float16 in float16 steps, else in float32, unrounded."""
    if x.dtype != torch.float16:
        x, cos, sin = x.float(), cos.float(), sin.float()
    return (x * cos).add_(rotate(x, mode) * sin)


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Input * r1 + rotate(input) * r2; r1 is the cosine, r2 the sine, both broadcast to input.

    float16 computes in float16, as the golden of op-plugin does; bfloat16 in float32: assumed.
    """
    require_float("npu_rotary_mul", "input", input)
    refuse("npu_rotary_mul", {"rotate": rotate})
    return embed(input, r1, r2, rotary_mode).to(input.dtype).contiguous()


def npu_apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:
    """Rotate query and key, BSND [B, S, N, D] or TND [T, N, D], with cos and sin [.., 1, D].

    float16 in float16, bfloat16 in float32 (the golden of op-plugin). D is 64 or 128. On a device
    the op may write to its arguments although its schema does not say so; here it does not.
    """
    op = "npu_apply_rotary_pos_emb"
    require_float(op, "query", query)
    if query.ndim != {"BSND": 4, "TND": 3}.get(layout) or query.shape[-1] not in _HEAD_DIMS:
        raise TargetError(
            op,
            f"a query {list(query.shape)} in {layout} is not emulated",
            "use BSND or TND with a head of 64 or 128",
        )
    if rotary_mode != "half":
        raise TargetError(op, f"rotary_mode {rotary_mode} is not known", "use half")
    first, second = (embed(x, cos, sin).to(x.dtype).contiguous() for x in (query, key))
    return first, second


def npu_rope_quant_kvcache(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    size_splits: Sequence[int],
    *,
    offset_k: Tensor | None = None,
    offset_v: Tensor | None = None,
    quant_mode: int = 0,
    input_layout: str = "BSND",
    kv_output: bool = False,
    cache_mode: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Split x into q, k and v, rotate q and k, quantize k and v into int8 caches.

    x [B, H] or [B, S, H] float16 or bfloat16; cos and sin [B, D] or [B, S, 1, D]; caches
    [blocks, block_size, M, D]; scales and offsets float32 [M, D]. Codes are
    clamp(rint(k / scale + offset)): it divides (dequant_rope_quant_kvcache.h:545-580). float16
    keys are rounded before that, bfloat16 ones are not (lines 520-528).
    cache_mode "page": indices int32, one flat slot a row. "contiguous": the row of batch b starts
    at indices[b] of cache[b]. Returns (q, k, v, k_cache, v_cache); k and v have no elements
    without kv_output. The caches are written in place and returned themselves.
    """
    require_float("npu_rope_quant_kvcache", "x", x)
    if quant_mode != 0 or input_layout != "BSND" or cache_mode not in ("page", "contiguous"):
        raise TargetError(
            "npu_rope_quant_kvcache",
            "only quant_mode 0, BSND and cache_mode page or contiguous are emulated",
            "use those",
        )
    dim = k_cache.shape[-1]
    q_heads, k_heads, v_heads = (size // dim for size in size_splits)
    turning, value = x.unflatten(-1, (-1, dim)).split([q_heads + k_heads, v_heads], -2)
    if x.ndim == 2:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    query, key = embed(turning, cos, sin).split([q_heads, k_heads], -2)
    codes = _codes(key, scale_k, offset_k), _codes(value, scale_v, offset_v)
    _write((k_cache, v_cache), codes, indices, cache_mode)
    if not kv_output:
        key = value = query.new_empty(0)
    outputs = (part.to(x.dtype).contiguous() for part in (query, key, value))
    query, key, value = outputs
    return query, key, value, k_cache, v_cache


def _heads(x: Tensor, sizes: Sequence[int], head_dim: int) -> list[Tensor]:
    return [part.unflatten(-1, (-1, head_dim)) for part in x.split(list(sizes), -1)]


def _codes(rows: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale is None:
        raise TargetError("cache write", "an int8 cache and no scale", "give one")
    value = rows.float() / scale
    return saturate(value if offset is None else value.add_(offset))


def _write(
    caches: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    indices: Tensor,
    cache_mode: str,
) -> None:
    if cache_mode == "page":
        rows = [each if each.ndim == 3 else each.flatten(0, -3) for each in codes]
        write_rows(list(zip(caches, rows, strict=True)), indices.flatten())
        return
    for cache, each in zip(caches, codes, strict=True):
        rows_of = each.unsqueeze(1) if each.ndim == 3 else each
        for batch, start in enumerate(indices.tolist()):
            cache[batch].narrow(0, start, rows_of.shape[1]).copy_(rows_of[batch])


def npu_dequant_rope_quant_kvcache(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    size_splits: Sequence[int],
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """npu_rope_quant_kvcache of int32 sums x: x * weight_scale [H] * activation_scale first.

    weight_scale float32 [H], activation_scale float32 [B] or [B * S], a row each; the product is
    rounded to the dtype of cos. An int32 bias is added before the scales, a float one after:
    assumed.
    """
    op = "npu_dequant_rope_quant_kvcache"
    if x.dtype != torch.int32 or weight_scale is None:
        raise TargetError(op, f"{x.dtype} without a weight scale", "give int32 sums and one")
    if bias is not None and bias.dtype == torch.int32:
        x = x + bias
    value = x.float() * weight_scale
    if activation_scale is not None:
        value = value * activation_scale.reshape(*x.shape[:-1], 1)
    if bias is not None and bias.dtype != torch.int32:
        value = value + bias.float()
    return npu_rope_quant_kvcache(
        value.to(cos.dtype),
        cos,
        sin,
        k_cache,
        v_cache,
        indices,
        scale_k,
        scale_v,
        size_splits,
        **keywords,
    )


def npu_qkv_rms_norm_rope_cache(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [T, (Nq + Nk + Nv) * D], norm and rotate q and k, write k and v to NZ int8 caches.

    q goes into q_out [T, Nq * D]; codes clamp(rint(k / scale + offset)) into caches
    [blocks, N * D // 32, block_size, 32] at the slots index int64 [T], where -1 writes nothing.
    qkv_size is [B, S, Nq + Nk + Nv, D], scales float32 [N, D], D is 128. Returns q, k and v as they
    are before quantization, or scalars without is_output_qkv. (CANN's document of the op and the
    golden of op-plugin; float32 between the norm and the rotation is assumed.)
    """
    op = "npu_qkv_rms_norm_rope_cache"
    require_float(op, "qkv", qkv)
    head_dim = qkv_size[3]
    if cache_mode != "PA_NZ" or head_dim != 128:
        raise TargetError(op, f"{cache_mode} caches of {head_dim}", "use PA_NZ and a head of 128")
    query, key, value = _heads(qkv, [heads * head_dim for heads in head_nums], head_dim)
    query, key = (
        _norm_and_embed(x, gamma, epsilon, cos, sin)
        for x, gamma in ((query, q_gamma), (key, k_gamma))
    )
    codes = _codes(key, k_scale, k_offset), _codes(value, v_scale, v_offset)
    write_rows_nz(list(zip((k_cache, v_cache), codes, strict=True)), index)
    flat = [x.flatten(1).to(qkv.dtype).contiguous() for x in (query, key, value)]
    q_out.copy_(flat[0])
    if not is_output_qkv:
        flat = [qkv.new_zeros(()) for _ in flat]
    return flat[0], flat[1], flat[2]


def _norm_and_embed(x: Tensor, gamma: Tensor, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    normed = x.float() * reciprocal_deviation(x, 1, epsilon) * gamma.float()
    return embed(normed, cos.unsqueeze(1), sin.unsqueeze(1))
