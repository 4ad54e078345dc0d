"""npu_fused_infer_attention_score and npu_incre_flash_attention on a CPU: one sequence at a time.

The sources are op-plugin's npu_fused_infer_attention_score.md and npu_incre_flash_attention.md and
the host checks of ops-transformer. What they do not allow, or what is not emulated, is refused.
Extension of kvc8: query, key, value and scales may be float32, which is not legal on a device.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.antiquant import (
    by_token,
    check_codes,
    check_token_scales,
    of_each,
    of_sides,
)
from kvc8.backends.npu.emulation.layouts import Layout, Paging
from kvc8.backends.npu.emulation.quantization import refuse
from kvc8.backends.npu.emulation.scaled_attention import (
    Codes,
    Mask,
    Window,
    attend,
    attend_codes,
    dequantize,
)
from kvc8.ir.errors import TargetError

_FIA = "npu_fused_infer_attention_score"
_IFA = "npu_incre_flash_attention"
_UNLIMITED = 2147483647
_MASK_SIDE = 2048


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = _UNLIMITED,
    next_tokens: int = _UNLIMITED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of many sequences: (out like query, the log-sum-exp or float32 [0]).

    query in input_layout BSH [B, S, N*D], BSND, BNSD or TND [T, N, D]; float16 or bfloat16.

    - Contiguous key and value lie like query. actual_seq_lengths(_kv) are lengths, one a sequence;
      in TND they are cumulative and required.
    - With block_table int32 [B, M] they are [blocks, block_size, kv_heads * D], or
      [blocks, kv_heads, block_size, D] in BNSD and TND, or in NZ format
      [blocks, kv_heads, D / 32, block_size, 32]; actual_seq_lengths_kv are lengths.
    - key and value int8, one query row a sequence: (codes + offset) * scale, in the dtype of query,
      per channel (of kv_heads * D values) or per tensor, mode 0. antiquant_scale and _offset hold
      key's and value's stacked; the key_ and value_ forms hold one each. The offset is minus the
      zero point. In mode 4 a scale a token, in pages as the codes: float32 [blocks, block_size]
      (ops-transformer aclnnFusedInferAttentionScoreV3.md); products in float32 are assumed.
    - sparse_mode 0 sees all keys, or with one query row a sequence those that atten_mask
      [B, 1, 1, S], S at least the slots of a table, does not hide; 3 is causal, the last row
      aligned with the last key; 4 is a band from pre_tokens before to next_tokens after that
      diagonal. 3 and 4 take the 2048 x 2048 upper triangle as atten_mask. With one query row, but
      in TND, a device ignores the mode, so 4 is refused there.

    query_rope and key_rope, that lie as query and key do, are more channels of each head, which no
    value has (the document's section on MLA): with them no codes, and no softmax_lse_flag.

    softmax_lse_flag asks for the logarithm of the sums that the weights are divided by, float32
    [B, N, S, 1], in TND [T, N, 1].

    Wider than a device: in TND an A2 takes heads of 128 or 192 only, and elsewhere heads that are
    multiples of 16, or of 32 for int8 codes. Any head up to 512 is taken here.
    Rows past the length of a sequence give zeros (assumed). inner_precise changes nothing here.
    """
    refuse(_FIA, others)
    tokens = by_token((antiquant_mode, key_antiquant_mode, value_antiquant_mode))
    layout = Layout(_FIA, input_layout, num_heads, num_key_value_heads or num_heads)
    layout.check_query(query)
    one_row = layout.rows(query) == 1
    masks = (
        _masks(atten_mask, len(query), key, block_table) if one_row and not sparse_mode else None
    )
    window = _window(sparse_mode, pre_tokens, next_tokens, None if masks else atten_mask)
    if sparse_mode == 4 and one_row:
        raise TargetError(_FIA, "a device ignores the band of one query row", "use TND")
    for_key, for_value = of_sides(
        (antiquant_scale, antiquant_offset),
        (key_antiquant_scale, key_antiquant_offset),
        (value_antiquant_scale, value_antiquant_offset),
    )
    paging = None if block_table is None else Paging(_FIA, block_table, block_size)
    for stored, parameters in ((key, for_key), (value, for_value)):
        if tokens:
            check_token_scales(layout, query, stored, parameters, paging)
        else:
            check_codes(layout, query, stored, parameters)
    _check_rope(query_rope, key_rope, key, softmax_lse_flag)
    out = torch.zeros(query.shape, dtype=query.dtype)
    lse = layout.sums(query) if softmax_lse_flag else None
    queries, outs = (
        layout.sequences(x, num_heads, actual_seq_lengths, "actual_seq_lengths")
        for x in (query, out)
    )
    keys, values, ropes = (
        [None] * len(queries)
        if x is None
        else _rows(layout, x, paging, actual_seq_lengths_kv, len(queries), layout.rows(query))
        for x in (key, value, key_rope)
    )
    turned, totals = (
        [None] * len(queries)
        if x is None
        else layout.sequences(x, num_heads, actual_seq_lengths, "actual_seq_lengths")
        for x in (query_rope, lse)
    )
    seen: Sequence[Window | Mask] = masks or [window] * len(queries)
    pages = paging if tokens else None
    scales = [of_each(x, pages, actual_seq_lengths_kv, len(queries)) for x in (for_key, for_value)]
    for q, k, v, of_k, of_v, r, s, o, total, visible in zip(
        queries, keys, values, *scales, turned, ropes, outs, totals, seen, strict=True
    ):
        layout.check_rows(q, k, v)
        if k.dtype == v.dtype == torch.int8:
            codes = Codes(k, *of_k), Codes(v, *of_v)
            found, each = attend_codes(
                q, *codes, scale, visible, divide_last=True, with_lse=softmax_lse_flag
            )
        else:
            k, v = dequantize(k, *for_key), dequantize(v, *for_value)
            q, k = _beside(q, r), _beside(k, s)
            found, each = attend(q, k, v, scale, visible, divide_last=True)
        o.copy_(found)
        if total is not None and each is not None:
            total.copy_(each)
    return out, torch.empty(0) if lse is None else layout.heads_first(lse)


def _check_rope(
    query_rope: Tensor | None, key_rope: Tensor | None, key: Tensor, sums: bool
) -> None:
    if query_rope is None and key_rope is None:
        return
    if query_rope is None or key_rope is None:
        raise TargetError(_FIA, "query_rope and key_rope go together", "give both or neither")
    if not key.is_floating_point() or sums:
        what = "with query_rope it takes neither codes nor softmax_lse_flag"
        raise TargetError(_FIA, what, "leave them out")


def _beside(rows: Tensor, rope: Tensor | None) -> Tensor:
    """Channels of heads [rows, heads, D] with more of them beside."""
    return rows if rope is None else torch.cat([rows, rope.to(rows.dtype)], -1)


def _masks(
    mask: Tensor | None, batch: int, key: Tensor, table: Tensor | None
) -> list[Window | Mask] | None:
    """What the one query row of each sequence does not see; None where there is no mask."""
    if mask is None:
        return None
    slots = 1 if table is None else table.shape[1] * key.shape[1]
    if mask.dtype != torch.bool or mask.shape[:-1] != (batch, 1, 1) or mask.shape[-1] < slots:
        raise TargetError(
            _FIA,
            f"atten_mask is {mask.dtype}{list(mask.shape)} for one query row of {batch} sequences",
            f"give torch.bool [{batch}, 1, 1, {slots}] or more",
        )
    return [Mask(row[0, 0]) for row in mask]


def _window(sparse_mode: int, before: int, after: int, mask: Tensor | None) -> Window:
    if sparse_mode == 0:
        if mask is not None or (before, after) != (_UNLIMITED, _UNLIMITED):
            raise TargetError(
                _FIA,
                "a mask or pre_tokens and next_tokens in sparse_mode 0 are not emulated",
                "use sparse_mode 3 or 4",
            )
        return Window()
    if sparse_mode not in (3, 4):
        raise TargetError(_FIA, f"sparse_mode {sparse_mode} is not emulated", "use 0, 3 or 4")
    _check_mask(mask)
    return Window(after=0) if sparse_mode == 3 else Window(before, after)


@functools.cache
def _triangle() -> Tensor:
    """The mask that sparse modes 3 and 4 take: what comes later, of four million pairs."""
    side = torch.arange(_MASK_SIDE, device="cpu")
    return side > side[:, None]


def _check_mask(mask: Tensor | None) -> None:
    if (
        mask is None
        or mask.dtype not in (torch.bool, torch.int8, torch.uint8)
        or mask.shape != (_MASK_SIDE, _MASK_SIDE)
        or not torch.equal(mask.bool(), _triangle())
    ):
        raise TargetError(
            _FIA,
            "atten_mask is not the upper triangle that sparse modes 3 and 4 take",
            f"give torch.ones({_MASK_SIDE}, {_MASK_SIDE}, dtype=torch.bool).triu(1)",
        )


def _rows(
    layout: Layout,
    x: Tensor,
    paging: Paging | None,
    lengths: Sequence[int] | None,
    batch: int,
    query_rows: int | None,
) -> Iterable[Tensor]:
    argument = "actual_seq_lengths_kv"
    if paging is None:
        rows = layout.sequences(x, layout.kv_heads, lengths, argument)
        if len(rows) != batch:
            raise TargetError(
                _FIA, f"keys of {len(rows)} sequences for queries of {batch}", "give both for each"
            )
        return rows
    pages = layout.page_rows(x)
    paging.check(pages, batch, query_rows)
    return paging.sequences(pages, layout.checked(lengths, batch, argument))


def npu_incre_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    actual_seq_lengths: Sequence[int] | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
    **others: Any,
) -> Tensor:
    """Attention of one query row a sequence: npu_fused_infer_attention_score with S = 1.

    actual_seq_lengths are those of key and value; layouts BSH, BSND and BNSD.
    """
    refuse(_IFA, others)
    if Layout(_IFA, input_layout, num_heads, num_key_value_heads or num_heads).rows(query) != 1:
        raise TargetError(_IFA, "query is not one row a sequence", f"use {_FIA}")
    out, _ = npu_fused_infer_attention_score(
        query,
        key,
        value,
        actual_seq_lengths_kv=actual_seq_lengths,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        block_table=block_table,
        num_heads=num_heads,
        scale=scale_value,
        input_layout=input_layout,
        num_key_value_heads=num_key_value_heads,
        block_size=block_size,
    )
    return out
