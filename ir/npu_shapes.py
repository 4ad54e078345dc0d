"""The shape rule of each NPU op: what torch_npu's meta functions say of what a call gives.

A program must infer the same shapes here and where the real torch_npu is. The rules check what
decides a shape and no more: whether a device takes a call is for the backend's legality table.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kvc8.ir.errors import TargetError

_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.int8,  # torch.qint8
    13: torch.uint8,  # torch.quint8
    15: torch.bfloat16,
}


def dtype_of(op: str, code: int | None, default: torch.dtype) -> torch.dtype:
    """The dtype that an int argument of op names (torch's scalar type numbers; None: default)."""
    if code is None:
        return default
    if code not in _DTYPES:
        raise TargetError(op, f"output type {code} is not known", f"use one of {sorted(_DTYPES)}")
    return _DTYPES[code]


def codes_of(op: str, code: int | None) -> torch.dtype:
    """The integer dtype that an int argument of a quantizing op names (None: int8)."""
    dtype = dtype_of(op, code, torch.int8)
    if dtype.is_floating_point:
        raise TargetError(op, f"output type {dtype} does not hold codes", "use torch.int8")
    return dtype


def _quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, *_: Any, **__: Any
) -> Tensor:
    return input.new_empty(input.shape, dtype=codes_of("npu_quantize", dtype))


def _dynamic_quant(input: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    codes = input.new_empty(input.shape, dtype=torch.int8)
    return codes, input.new_empty(input.shape[:-1], dtype=torch.float32)


def _quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, output_dtype: int | None = None, **_: Any
) -> Tensor:
    if x1.shape[-1] != x2.shape[-2]:
        raise TargetError(
            "npu_quant_matmul",
            f"x1 is {list(x1.shape)} and x2 is {list(x2.shape)}",
            "give x2 as [in_features, out_features]",
        )
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    dtype = dtype_of("npu_quant_matmul", output_dtype, torch.int8)
    return x1.new_empty((*batch, x1.shape[-2], x2.shape[-1]), dtype=dtype)


def _dequant_bias(x: Tensor, *_: Any, output_dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=output_dtype or torch.float16)


def _trans_quant_param(scale: Tensor, offset: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    shape = scale.shape
    if offset is not None:
        shape = torch.broadcast_shapes(shape, offset.shape)
    return scale.new_empty(shape, dtype=torch.int64)


def _anti_quant(x: Tensor, scale: Tensor, *, dst_dtype: int | None = None, **_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype_of("npu_anti_quant", dst_dtype, torch.float16))


def _copies_of_caches(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return key_cache.new_empty(key_cache.shape), value_cache.new_empty(value_cache.shape)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _first_itself(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _like_first(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.new_empty(input.shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    input_layout: str = "BSH",
    quant_scale2: Tensor | None = None,
    **_: Any,
) -> Tensor:
    rank = {"BSH": 3, "TND": 3, "BSND": 4, "BNSD": 4}.get(input_layout)
    if rank is None:
        raise TargetError(
            "attention", f"input_layout {input_layout} is not known", "use BSH, BSND, BNSD or TND"
        )
    if query.ndim != rank or num_heads <= 0:
        raise TargetError(
            "attention",
            f"a query of {list(query.shape)} with {num_heads} heads is not {input_layout}",
            "reshape it",
        )
    return query.new_empty(query.shape, dtype=torch.int8 if quant_scale2 is not None else None)


def _fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    input_layout: str = "BSH",
    softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    out = _attention(query, key, value, num_heads=num_heads, input_layout=input_layout, **others)
    batch_and_rows = {"BSH": (0, 1), "BSND": (0, 1), "BNSD": (0, 2)}
    shape: tuple[int, ...] = (0,)
    if softmax_lse_flag and input_layout == "TND":
        shape = (query.shape[0], query.shape[1], 1)
    elif softmax_lse_flag:
        batch, rows = (query.shape[dim] for dim in batch_and_rows[input_layout])
        shape = (batch, num_heads, rows, 1)
    return out, query.new_empty(shape, dtype=torch.float32)


def _reciprocal_deviation(x: Tensor, gamma: Tensor) -> Tensor:
    shape = (*x.shape[: x.ndim - gamma.ndim], *(1 for _ in range(gamma.ndim)))
    return x.new_empty(shape, dtype=torch.float32)


def _rms_norm(input: Tensor, gamma: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _like_first(input), _reciprocal_deviation(input, gamma)


def _add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_first(x1), _reciprocal_deviation(x1, gamma), _like_first(x1)


def _rms_norm_quant(x: Tensor, *_: Any, dst_dtype: int | None = None, **__: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=codes_of("npu_rms_norm_quant", dst_dtype))


def _add_rms_norm_quant(
    x1: Tensor, *_: Any, dst_type: int | None = None, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = codes_of("npu_add_rms_norm_quant", dst_type)
    return x1.new_empty(x1.shape, dtype=dtype), x1.new_empty(x1.shape, dtype=dtype), _like_first(x1)


def _apply_rotary_pos_emb(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _like_first(query), _like_first(key)


def _rope_quant_kvcache(
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
    kv_output: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kv_heads, head_dim = k_cache.shape[2:]
    query = cos.new_empty((*x.shape[:-1], size_splits[0] // head_dim, head_dim))
    rows = (*x.shape[:-1], kv_heads, head_dim) if kv_output else (0,)
    return query, cos.new_empty(rows), cos.new_empty(rows), k_cache, v_cache


def _qkv_rms_norm_rope_cache(
    qkv: Tensor, *args: Any, is_output_qkv: bool = False, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    qkv_size, head_nums = args[8:10]
    shapes = [(qkv.shape[0], heads * qkv_size[3]) if is_output_qkv else () for heads in head_nums]
    query, key, value = (qkv.new_empty(shape) for shape in shapes)
    return query, key, value


def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    shape = list(input.shape)
    shape[dim] = shape[dim] // 2
    return input.new_empty(shape)


def _swiglu_quant(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _geglu(input: Tensor, dim: int = -1, *_: Any) -> tuple[Tensor, Tensor]:
    return _swiglu(input, dim), _swiglu(input, dim)


def _gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    experts, rows = (x.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return x.new_empty(shape), experts, rows


def _gating_top_k(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], k)
    experts = x.new_empty(shape, dtype=torch.int32)
    return x.new_empty(shape), experts, x.new_empty(x.shape, dtype=torch.float32)


def _init_routing(
    x: Tensor, expert_idx: Tensor, *, expert_num: int = -1, quant_mode: int = -1, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0] * expert_idx.shape[1]
    dtype = torch.int8 if quant_mode in (0, 1) else x.dtype
    return (
        x.new_empty((rows, x.shape[1]), dtype=dtype),
        x.new_empty((rows,), dtype=torch.int32),
        x.new_empty((expert_num,), dtype=torch.int64),
        x.new_empty((rows,), dtype=torch.float32),
    )


def _grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    split_item: int | None = 0,
    output_dtype: int | None = None,
    **_: Any,
) -> list[Tensor]:
    if len(x) != 1 or len(weight) != 1 or split_item not in (2, 3) or weight[0].ndim != 3:
        raise TargetError(
            "npu_grouped_matmul",
            f"{len(x)} inputs by {len(weight)} weights, split_item {split_item}",
            "give one input, one weight [experts, in, out] and split_item 2",
        )
    dtype = dtype_of("npu_grouped_matmul", output_dtype, x[0].dtype)
    return [x[0].new_empty((x[0].shape[0], weight[0].shape[2]), dtype=dtype)]


def _token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    each = 1 if probs is None else probs.shape[1]
    rows = sorted_indices.shape[0] // each
    return permuted_tokens.new_empty((rows, permuted_tokens.shape[1]))


SHAPE_RULES = MappingProxyType[str, Callable[..., Any]](
    {
        "npu_quantize": _quantize,
        "npu_dynamic_quant": _dynamic_quant,
        "npu_quant_matmul": _quant_matmul,
        "npu_dequant_bias": _dequant_bias,
        "npu_trans_quant_param": _trans_quant_param,
        "npu_anti_quant": _anti_quant,
        "npu_scatter_pa_kv_cache": _nothing,
        "npu_scatter_pa_kv_cache_functional": _copies_of_caches,
        "npu_scatter_nd_update_": _first_itself,
        "npu_quant_scatter_": _first_itself,
        "npu_fused_infer_attention_score": _fused_infer_attention_score,
        "npu_incre_flash_attention": _attention,
        "npu_rms_norm": _rms_norm,
        "npu_add_rms_norm": _add_rms_norm,
        "npu_rms_norm_quant": _rms_norm_quant,
        "npu_add_rms_norm_quant": _add_rms_norm_quant,
        "npu_rotary_mul": _like_first,
        "npu_apply_rotary_pos_emb": _apply_rotary_pos_emb,
        "npu_rope_quant_kvcache": _rope_quant_kvcache,
        "npu_dequant_rope_quant_kvcache": _rope_quant_kvcache,
        "npu_qkv_rms_norm_rope_cache": _qkv_rms_norm_rope_cache,
        "npu_swiglu": _swiglu,
        "npu_swiglu_quant": _swiglu_quant,
        "npu_dequant_swiglu_quant": _swiglu_quant,
        "npu_geglu": _geglu,
        "npu_moe_gating_top_k_softmax": _gating_top_k_softmax,
        "npu_moe_gating_top_k": _gating_top_k,
        "npu_moe_init_routing_v2": _init_routing,
        "npu_grouped_matmul": _grouped_matmul,
        "npu_moe_token_unpermute": _token_unpermute,
        "_npu_reshape_and_cache": _nothing,
        "_npu_paged_attention": _nothing,
        "_npu_paged_attention_quant": _nothing,
        "_npu_quantize_per_tensor": _nothing,
    }
)
