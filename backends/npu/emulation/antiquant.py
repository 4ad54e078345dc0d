"""What the codes of keys and values stand for: the antiquant arguments of the attention ops."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.layouts import NZ_RANK, Layout, Paging
from kvc8.ir.errors import TargetError

_FIA = "npu_fused_infer_attention_score"

Antiquant = tuple[Tensor | None, Tensor | None]  # scale and offset


def of_sides(both: Antiquant, key: Antiquant, value: Antiquant) -> tuple[Antiquant, Antiquant]:
    """What key has and what value has, given stacked or apart; raises TargetError for both."""
    if not _given(both):
        return key, value
    if _given(key) or _given(value):
        raise TargetError(
            _FIA, "antiquant_scale and key_antiquant_scale exclude each other", "give one form"
        )
    if any(x is not None and x.shape[0] != 2 for x in both):
        raise TargetError(_FIA, "antiquant_scale does not stack two", "give [2, kv_heads * D]")
    for_key, for_value = ([None if x is None else x[i] for x in both] for i in (0, 1))
    return (for_key[0], for_key[1]), (for_value[0], for_value[1])


def _given(parameters: Antiquant) -> bool:
    return any(x is not None for x in parameters)


def by_token(modes: tuple[int, int, int]) -> bool:
    """Whether codes have a scale a token, in pages; a scale a channel if not."""
    if modes not in ((0, 0, 0), (0, 4, 4)):
        what = f"antiquant modes {', '.join(map(str, modes))} are not emulated"
        raise TargetError(_FIA, what, "use 0, or 4 for key and value")
    return modes == (0, 4, 4)


def check_codes(layout: Layout, query: Tensor, stored: Tensor, parameters: Antiquant) -> None:
    """Raise TargetError unless a scale a channel, or one, goes with the codes of key or value."""
    scale, _ = parameters
    if stored.dtype == query.dtype and not _given(parameters):
        return
    if stored.dtype != torch.int8 or scale is None:
        raise TargetError(
            _FIA,
            f"{stored.dtype} keys or values for a {query.dtype} query",
            "give its dtype, or int8 with an antiquant scale",
        )
    if layout.rows(query) != 1:
        raise TargetError(
            _FIA, "int8 keys or values with several query rows a sequence", "dequantize first"
        )
    width = stored.shape[-1] if stored.ndim == 3 else layout.kv_heads * stored.shape[-1]
    if stored.ndim == NZ_RANK:
        width = stored.shape[1] * stored.shape[2] * stored.shape[4]
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.dtype != query.dtype or parameter.numel() not in (1, width):
            given = f"{parameter.dtype}{list(parameter.shape)}"
            what = f"an antiquant parameter is {given} for a {query.dtype} query"
            raise TargetError(_FIA, what, f"give {width} values, or one, in its dtype")


def check_token_scales(
    layout: Layout, query: Tensor, stored: Tensor, parameters: Antiquant, paging: Paging | None
) -> None:
    """Raise TargetError unless a scale a token goes with the pages of key or value."""
    scale, offset = parameters
    if paging is None or layout.rows(query) != 1 or stored.dtype != torch.int8 or stored.ndim != 3:
        what = "mode 4 is for int8 pages [blocks, block_size, heads * D] and one query row"
        raise TargetError(_FIA, what, "use mode 0")
    if offset is not None:
        raise TargetError(_FIA, "offsets of tokens are not emulated", "leave them out")
    if scale is None or scale.dtype != torch.float32 or scale.shape != stored.shape[:2]:
        given = "none" if scale is None else f"{scale.dtype}{list(scale.shape)}"
        what = f"the scales of tokens are {given} for pages {list(stored.shape)}"
        raise TargetError(_FIA, what, f"give torch.float32{list(stored.shape[:2])}")


def of_each(
    parameters: Antiquant, pages: Paging | None, lengths: Sequence[int] | None, count: int
) -> Iterable[tuple[Tensor | None, ...]]:
    """Scale, offset and scales of tokens for each sequence; those in `pages`, if they are given."""
    scale, offset = parameters
    if pages is None or scale is None or lengths is None:
        return [(scale, offset, None)] * count
    return ((None, None, steps) for steps in pages.sequences(scale, lengths))
