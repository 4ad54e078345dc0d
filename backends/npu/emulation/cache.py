"""Writes to caches, on a CPU: pure data movement, but for npu_quant_scatter_.

A slot is block * block_size + offset. A negative slot writes nothing (the goldens of op-plugin);
slots must be unique (op-plugin npu_scatter_pa_kv_cache.md), so others than that are refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.quantization import refuse, require_float, saturate
from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import codes_of

_SCATTER = "npu_scatter_pa_kv_cache"

CacheRows = tuple[Tensor, Tensor]  # a cache, and what is to be written to it


def write_rows(parts: Sequence[CacheRows], slots: Tensor) -> None:
    """Put rows [T, N, D] at slots [T] of caches [blocks, block_size, N, D]; -1 writes nothing."""
    kept, slots = _kept(slots, min(cache.shape[0] * cache.shape[1] for cache, _ in parts))
    for cache, rows in parts:
        new = rows if kept is None else rows[kept]
        if cache.is_contiguous():
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)
        else:
            cache[slots // cache.shape[1], slots % cache.shape[1]] = new


def write_rows_nz(parts: Sequence[CacheRows], slots: Tensor) -> None:
    """Put rows [T, N, D] at slots [T] of caches [blocks, N*D//c, block_size, c] (fractal NZ)."""
    kept, slots = _kept(slots, min(cache.shape[0] * cache.shape[2] for cache, _ in parts))
    for cache, rows in parts:
        new = rows if kept is None else rows[kept]
        pieces = new.reshape(-1, cache.shape[1], cache.shape[3])
        cache[slots // cache.shape[2], :, slots % cache.shape[2]] = pieces


def _kept(slots: Tensor, capacity: int) -> tuple[Tensor | None, Tensor]:
    """Which rows have a slot, None where all have, and their slots."""
    given = slots.tolist()
    used = [slot for slot in given if slot >= 0]
    if used and max(used) >= capacity:
        raise TargetError(
            "cache write",
            f"slot {max(used)} lies outside a cache of {capacity}",
            "check the block table",
        )
    if len(set(used)) != len(used):
        raise TargetError("cache write", "two rows have one slot", "give unused rows the slot -1")
    if len(used) == len(given):
        return None, slots.long()
    return slots >= 0, slots[slots >= 0].long()


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **others: Any,
) -> None:
    """Write key and value [T, N, D] to slots of two caches, in place; all four of one dtype.

    cache_mode "Norm": caches [blocks, block_size, N, D]; "PA_NZ" (the default): caches
    [blocks, N*D//c, block_size, c], c 32 for int8 and 16 for float16 and bfloat16 (op-plugin
    npu_scatter_pa_kv_cache.md; the goldens of test_scatter_pa_kv_cache.py). slot_mapping int32 or
    int64 [T]. Extension of kvc8: float32.
    """
    refuse(_SCATTER, others)
    if cache_mode not in ("Norm", "PA_NZ"):
        raise TargetError(_SCATTER, f"cache_mode {cache_mode} is not known", "use Norm or PA_NZ")
    if len({key.dtype, value.dtype, key_cache.dtype, value_cache.dtype}) > 1:
        caches = f"{key_cache.dtype} and {value_cache.dtype} caches"
        what = f"{key.dtype} and {value.dtype} rows for {caches}"
        raise TargetError(_SCATTER, what, "give all four one dtype")
    nz, parts = cache_mode == "PA_NZ", ((key_cache, key), (value_cache, value))
    for cache, rows in parts:
        _check_cache(_SCATTER, cache, rows, nz=nz)
    (write_rows_nz if nz else write_rows)(parts, slot_mapping)


def _check_cache(op: str, cache: Tensor, rows: Tensor, *, nz: bool) -> None:
    width = rows.shape[1:].numel()
    if nz and (cache.ndim != 4 or cache.shape[1] * cache.shape[3] != width):
        raise TargetError(
            op,
            f"a cache {list(cache.shape)} is not NZ for rows {list(rows.shape)}",
            "make it [blocks, width // c, block_size, c], or write with cache_mode Norm",
        )
    if not nz and cache.shape[2:] != rows.shape[1:]:
        raise TargetError(
            op,
            f"a cache {list(cache.shape)} does not take rows {list(rows.shape)}",
            "make it [blocks, block_size, heads, head_dim]",
        )


def npu_scatter_pa_kv_cache_functional(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """The caches after npu_scatter_pa_kv_cache, which leaves its arguments as they were."""
    key_out, value_out = (
        cache.clone(memory_format=torch.contiguous_format) for cache in (key_cache, value_cache)
    )
    npu_scatter_pa_kv_cache(key, value, key_out, value_out, slot_mapping, **keywords)
    return key_out, value_out


def npu_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    """The op atb::_npu_reshape_and_cache: write key and value [T, N, D] to slots, in place.

    Caches [blocks, block_size, N, D], or NZ [blocks, N*D//c, block_size, c] (the goldens of
    op-plugin test_atb_reshape_and_cache.py). On a device the format of the cache says which; a CPU
    tensor has none, so here its shape does.
    """
    for cache, rows in ((key_cache, key), (value_cache, value)):
        nz = cache.shape[2:] != rows.shape[1:]
        _check_cache("_npu_reshape_and_cache", cache, rows, nz=nz)
        (write_rows_nz if nz else write_rows)([(cache, rows)], slot_indices)


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Set input[indices[i]] = updates[i] in place: indices int32 or int64 [..., r], r leading dims.

    (op-plugin npu_scatter_nd_update_.md.) What a device does with a negative index is not
    documented, so it is refused.
    """
    if indices.numel() and int(indices.min()) < 0:
        raise TargetError(
            "npu_scatter_nd_update_", "an index is negative", "drop that row beforehand"
        )
    input[tuple(indices.long().unbind(-1))] = updates
    return input


def npu_quant_scatter_(
    input: Tensor,
    indices: Tensor,
    updates: Tensor,
    quant_scales: Tensor,
    quant_zero_points: Tensor | None = None,
    axis: int = -2,
    quant_axis: int = -1,
    reduce: str = "update",
    dst_type: int | None = None,
    round_mode: str | None = "rint",
) -> Tensor:
    """Quantize updates [B, N, s, D] and put them into input int8 [B, N, S, D] from indices[b] on.

    clamp(rint(updates / quant_scales + quant_zero_points)) in float32, the parameters broadcast
    along the last axis (op-plugin npu_quant_scatter_.md and its golden); indices int32 [B].
    """
    require_float("npu_quant_scatter_", "updates", updates)
    if (axis, quant_axis, reduce, round_mode, indices.ndim) != (-2, -1, "update", "rint", 1):
        raise TargetError(
            "npu_quant_scatter_",
            "only axis -2, quant_axis -1, update, rint are emulated",
            "use those",
        )
    if codes_of("npu_quant_scatter_", dst_type) != input.dtype:
        raise TargetError("npu_quant_scatter_", f"codes for a {input.dtype} cache", "make it int8")
    value = updates.float() / quant_scales.float()
    if quant_zero_points is not None:
        value = value + quant_zero_points.float()
    for batch, start in enumerate(indices.tolist()):
        input[batch].narrow(-2, start, updates.shape[-2]).copy_(saturate(value[batch]))
    return input
