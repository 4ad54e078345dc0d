"""What the attention ops share on a CPU: softmax(q k^T) v for one sequence, pages, int8 codes.

Logits, softmax and sums are float32; weights are rounded to the dtype of the query before they meet
the values, as the goldens of the vendor have it. A device splits int8 products into planes ("MSD")
and rounds elsewhere: these results check contracts, not its last bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir.errors import TargetError

_ROWS = 256  # query rows at a time, so a long prompt does not need all its logits at once


@dataclass(frozen=True)
class Window:
    """Which keys a query row sees, aligned at the last row and the last key: None is no limit."""

    before: int | None = None
    after: int | None = None

    def hidden(self, rows: Tensor, queries: int, keys: int) -> Tensor | None:
        """Mask [rows, keys], True where a key is out of sight; None if everything is seen."""
        if self.before is None and self.after is None:
            return None
        distance = torch.arange(keys) - (rows[:, None] + keys - queries)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.before is not None:
            hidden |= distance < -self.before
        if self.after is not None:
            hidden |= distance > self.after
        return hidden


@dataclass(frozen=True)
class Mask:
    """Which keys the one query row of a sequence does not see: bool [keys or more]."""

    row: Tensor

    def hidden(self, rows: Tensor, queries: int, keys: int) -> Tensor:
        """Mask [rows, keys], as Window gives it."""
        assert queries == 1
        return self.row[:keys].expand(len(rows), keys)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: Window | Mask,
    *,
    divide_last: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of query [q, N, D] to float32 key and value [k, M, D], N a multiple of M.

    The result is like query; with it comes the logarithm of the sum of exp(logit) that each row and
    head divides by, float32 [q, N, 1]. A row that sees no key gives zeros and -inf (assumed).
    divide_last: weights are
    divided by their sum after they met the values (the goldens of npu_fused_infer_attention_score),
    else before they are rounded (those of ATB).
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full_like(query[..., :1], -torch.inf).float()
    if not len(key):
        return out, lse
    for rows in torch.arange(len(query)).split(_ROWS):
        hidden = window.hidden(rows, len(query), len(key))
        weights, total, largest = _weights(query[rows], key, scale, hidden)
        lse[rows] = (largest + total.log()).permute(2, 0, 1, 3).flatten(1, 2)
        weights = (weights if divide_last else weights / total).to(query.dtype).float()
        sums = weights.flatten(1, 2) @ value.transpose(0, 1)
        sums = sums.unflatten(1, weights.shape[1:3])
        sums = sums / total if divide_last else sums
        out[rows] = sums.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out, lse


def _weights(
    query: Tensor, key: Tensor, scale: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest) [M, N / M, q, k], its sums over k, and the largest logits."""
    grouped = query.float().unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
    logits = grouped.flatten(1, 2) @ key.permute(1, 2, 0) * scale
    logits = logits.unflatten(1, grouped.shape[1:3])
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest.masked_fill(largest == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights, total.masked_fill(total == 0, 1), largest


def pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first length rows of a sequence, out of a cache [blocks, block_size, ...]."""
    used = -(-length // cache.shape[1])
    blocks = table[:used].long()
    if len(blocks) < used or not bool(((blocks >= 0) & (blocks < len(cache))).all()):
        raise TargetError(
            "attention",
            f"blocks {blocks.tolist()} of {len(cache)} for {length} rows",
            f"give {used} blocks that exist",
        )
    return cache[blocks].flatten(0, 1)[:length]


def dequantize(codes: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """(codes + offset) * scale in float32, codes [k, M, D], parameters of M*D values or of one.

    The offset is minus the zero point. (ATB tests/apitest/kernelstest/mix
    test_paged_attention_common.py:89-103; ops-transformer's design of IncreFlashAttention.)
    """
    value = codes.float()
    if offset is not None:
        value = value + _per_channel(offset, codes)
    if scale is not None:
        value = value * _per_channel(scale, codes)
    return value


def _per_channel(parameter: Tensor, codes: Tensor) -> Tensor:
    flat = parameter.float().reshape(-1)
    return flat if flat.numel() == 1 else flat.reshape(codes.shape[1:])
