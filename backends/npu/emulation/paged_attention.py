"""The attention ops of ATB over a paged cache, on a CPU: one query row a sequence.

query [T, N, D], caches [blocks, block_size, M, D], block_table int32 [T, blocks], context_lens
int32 [T] on the host. The result goes into out, like query. (op-plugin PagedAttentionAtb.cpp,
Fa3Atb.cpp; ATB infer_op_params.h and tests/apitest/kernelstest/mix test_paged_attention_common.py.)
"""

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.quantization import require_float
from kvc8.backends.npu.emulation.scaled_attention import Codes, Window, attend_codes, pages
from kvc8.ir.errors import TargetError

_QUANT = "_npu_paged_attention_quant"
_ACL_DTYPES = {0: torch.float32, 1: torch.float16, 27: torch.bfloat16}
_LARGEST_HEAD = 256
_LARGEST_PAGE = 128 * 128  # block_size * head_dim


def npu_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """The op atb::_npu_paged_attention: caches in the dtype of query; int8 ones it cannot read."""
    if key_cache.dtype != query.dtype or value_cache.dtype != query.dtype:
        raise TargetError(
            "_npu_paged_attention",
            f"{key_cache.dtype} keys for a {query.dtype} query",
            f"use {_QUANT}",
        )
    _check("_npu_paged_attention", query, key_cache, (num_heads, num_kv_heads))
    _attend(
        query, (key_cache, value_cache), (None, None), block_table, context_lens, scale_value, out
    )


def npu_paged_attention_quant(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    quant_type: int,
    outdata_type: int,
    k_descale: Tensor,
    v_descale: Tensor,
    out: Tensor,
) -> None:
    """The op atb::_npu_paged_attention_quant with quant_type 1: int8 caches, codes * descale.

    Symmetric: this op takes no offsets. k_descale and v_descale [M * D], float32 or the bits of a
    float32 in an int64 (taken in full: whether a device cuts them to FP19 is not known).
    outdata_type is ACL's number of the dtype of out, 1 float16 or 27 bfloat16. The shipped tests of
    this op cover quant_type 3 only.
    """
    if quant_type != 1 or key_cache.dtype != torch.int8 or value_cache.dtype != torch.int8:
        raise TargetError(
            _QUANT, f"quant_type {quant_type} is not emulated", "use 1 and int8 caches"
        )
    if _ACL_DTYPES.get(outdata_type) != out.dtype:
        raise TargetError(
            _QUANT,
            f"outdata_type {outdata_type} for {out.dtype}",
            "give 1 for float16 or 27 for bfloat16",
        )
    _check(_QUANT, query, key_cache, (num_heads, num_kv_heads))
    scales = _descale(k_descale), _descale(v_descale)
    _attend(query, (key_cache, value_cache), scales, block_table, context_lens, scale_value, out)


def _check(op: str, query: Tensor, cache: Tensor, heads: tuple[int, int]) -> None:
    require_float(op, "query", query)
    block_size, kv_heads, head_dim = cache.shape[1:]
    if head_dim > _LARGEST_HEAD or block_size * head_dim > _LARGEST_PAGE:
        raise TargetError(
            op,
            f"blocks of {block_size} by {head_dim}",
            f"keep the head to {_LARGEST_HEAD} and their product to {_LARGEST_PAGE}",
        )
    if heads != (query.shape[1], kv_heads) or query.shape[1] % kv_heads:
        raise TargetError(
            op,
            f"{heads} heads for a query {list(query.shape)} and a cache {list(cache.shape)}",
            "give the number of each",
        )


def _descale(scale: Tensor) -> Tensor:
    if scale.dtype != torch.int64:
        return scale.float()
    return (
        scale.contiguous().view(torch.int32).reshape(-1, 2)[:, 0].contiguous().view(torch.float32)
    )


def _attend(
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    tables = block_table.tolist()
    for row, length in enumerate(context_lens.tolist()):
        key, value = (
            Codes(pages(cache, tables[row], length), descale)
            for cache, descale in zip(caches, scales, strict=True)
        )
        one = query[row : row + 1]
        made, _ = attend_codes(one, key, value, scale, Window(), divide_last=False, with_lse=False)
        out[row] = made[0]
