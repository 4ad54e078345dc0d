"""What the attention ops share on a CPU: softmax(q k^T) v for one sequence, pages, int8 codes.

Logits, softmax and sums are float32; weights are rounded to the dtype of the query before they meet
the values, as the goldens of the vendor have it. A device splits int8 products into planes ("MSD")
and rounds elsewhere: these results check contracts, not its last bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir.errors import TargetError

_ROWS = 256  # query rows at a time, so a long prompt does not need all its logits at once
_FLOATS = 1 << 18  # int8 codes that are floats at one time: a megabyte, which a CPU's cache holds


@dataclass(frozen=True)
class Window:
    """Which keys a query row sees, aligned at the last row and the last key: None is no limit."""

    before: int | None = None
    after: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether everything is seen."""
        return self.before is None and self.after is None

    def hidden_from_last(self, keys: int) -> Tensor | None:
        """`hidden` of the last row alone."""
        return None if self.is_open else self.hidden(torch.zeros(1, dtype=torch.int64), 1, keys)

    def hidden(self, rows: Tensor, queries: int, keys: int) -> Tensor | None:
        """Mask [rows, keys], True where a key is out of sight; None if everything is seen."""
        if self.is_open:
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

    def hidden_from_last(self, keys: int) -> Tensor:
        """Mask [1, keys], as Window gives it."""
        return self.row[:keys].unsqueeze(0)

    def hidden(self, rows: Tensor, queries: int, keys: int) -> Tensor:
        """Mask [rows, keys], as Window gives it."""
        assert queries == 1
        return self.row[:keys].expand(len(rows), keys)


@dataclass(frozen=True)
class Codes:
    """int8 rows [k, M, D], and the scale and offset, of M*D values or of one, that they have.

    Or `steps`, float32 [k]: a scale of each row.
    """

    rows: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    steps: Tensor | None = None

    def floats(self, rows: Tensor, memory: Tensor | None) -> Tensor:
        """What some of its rows stand for, float32 [n, M, D], in the first part of `memory`.

        Memory taken anew for each of many parts would cost as much time as all the rest.
        """
        out = None if memory is None else memory[: rows.shape[0]]
        return dequantize(rows, self.scale, self.offset, out)

    def folded(self, query: Tensor) -> tuple["Codes", Tensor]:
        """Codes and a float32 query [M, G, D] of the same products, with fewer to compute.

        (q * scale) * code is the real number q * (scale * code), and both brackets are exact in
        float32: a scale in half precision has at most 11 bits, and so has the query it comes with
        (as long as neither product is too small or large for a float32, whose range bfloat16 has).
        """
        if self.offset is not None or self.scale is None or self.scale.dtype == torch.float32:
            return self, query
        scale = self.scale.float()
        if scale.numel() > 1:
            scale = scale.reshape(query.shape[0], 1, -1)
        return Codes(self.rows), query * scale


def attend_codes(
    query: Tensor,
    key: Codes,
    value: Codes,
    scale: float,
    window: Window | Mask,
    *,
    divide_last: bool,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`attend` of one query row [1, N, D] to int8 codes, of which few are floats at one time."""
    length, heads = key.rows.shape[:2]
    if not length or not query.shape[0]:
        return attend(query, key.rows.float(), value.rows.float(), scale, window, divide_last=True)
    grouped = query.float().reshape(heads, -1, query.shape[2])  # [M, N / M, D]
    step = max(1, _FLOATS // (heads * query.shape[2]))
    memory = None if length <= step else torch.empty(step, *key.rows.shape[1:])
    logits = _logits(grouped, key, step, memory).mul_(scale)
    if key.steps is not None:
        logits.mul_(key.steps)
    weights, total, largest = _softmax(logits, window.hidden_from_last(length))
    weights = (weights if divide_last else weights / total).to(query.dtype).float()
    if value.steps is not None:
        weights = weights * value.steps
    sums = _sums(weights, value, step, memory)
    out = (sums.div_(total) if divide_last else sums).to(query.dtype)
    lse = largest.add_(total.log_()).view(1, -1, 1) if with_lse else None
    return out.view(1, -1, query.shape[2]), lse


def _logits(query: Tensor, key: Codes, step: int, memory: Tensor | None) -> Tensor:
    """Products [M, G, k] of a query [M, G, D] and keys, `step` rows at a time."""
    codes, query = key.folded(query)
    if memory is None:
        return torch.bmm(query, codes.floats(codes.rows, None).permute(1, 2, 0))
    logits = torch.empty(*query.shape[:2], codes.rows.shape[0])
    for rows, part in zip(codes.rows.split(step), logits.split(step, -1), strict=True):
        torch.bmm(query, codes.floats(rows, memory).permute(1, 2, 0), out=part)
    return logits


def _sums(weights: Tensor, value: Codes, step: int, memory: Tensor | None) -> Tensor:
    """Sums [M, G, D] of values by weights [M, G, k], `step` rows at a time."""
    if memory is None:
        return torch.bmm(weights, value.floats(value.rows, None).transpose(0, 1))
    sums = weights.new_zeros(*weights.shape[:2], value.rows.shape[2])
    for part, rows in zip(weights.split(step, -1), value.rows.split(step), strict=True):
        sums.baddbmm_(part, value.floats(rows, memory).transpose(0, 1))
    return sums


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

    The result has the rows, heads and dtype of query and the channels of value. With it comes the
    logarithm of the sum of exp(logit) that each row and head divides by, float32 [q, N, 1]. A row
    that sees no key gives zeros and -inf (assumed). divide_last: weights are divided by their sum
    after they met the values (the goldens of npu_fused_infer_attention_score), else before they are
    rounded (those of ATB).
    """
    out = query.new_zeros(*query.shape[:2], value.shape[2])
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
    return _softmax(logits.unflatten(1, grouped.shape[1:3]), hidden)


def _softmax(logits: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest) in place, its sums over the last dimension, and the largest logits."""
    if hidden is None:
        largest = logits.amax(-1, keepdim=True)
        weights = logits.sub_(largest).exp_()
        return weights, weights.sum(-1, keepdim=True), largest
    largest = logits.masked_fill_(hidden, -torch.inf).amax(-1, keepdim=True)
    weights = logits.sub_(largest.masked_fill(largest == -torch.inf, 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights, total.masked_fill(total == 0, 1), largest


def pages(cache: Tensor, table: Sequence[int], length: int) -> Tensor:
    """The first length rows of a sequence, out of a cache [blocks, block_size, ...], to be read.

    They are a part of the cache itself where its blocks lie one after the other, else a copy.
    """
    used = -(-length // cache.shape[1])
    blocks, count = table[:used], cache.shape[0]
    if len(blocks) < used or not all(0 <= block < count for block in blocks):
        raise TargetError(
            "attention",
            f"blocks {blocks} of {count} for {length} rows",
            f"give {used} blocks that exist",
        )
    first = blocks[0] if blocks else 0
    if blocks == list(range(first, first + used)):
        if cache.is_contiguous():
            first *= cache.shape[1]
            return cache.view(-1, *cache.shape[2:])[first : first + length]
        return cache[first : first + used].flatten(0, 1)[:length]
    return cache.index_select(0, torch.tensor(blocks)).flatten(0, 1)[:length]


def dequantize(
    codes: Tensor, scale: Tensor | None, offset: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """(codes + offset) * scale in float32, codes [k, M, D], parameters of M*D values or of one.

    The offset is minus the zero point. With `out` it is made there. (ATB tests/apitest/kernelstest/
    mix test_paged_attention_common.py:89-103; ops-transformer's design of IncreFlashAttention.)
    """
    if out is None and scale is None and offset is None:
        return codes.float()
    value = codes.to(torch.float32, copy=True) if out is None else out.copy_(codes)
    if offset is not None:
        value += _per_channel(offset, codes)
    if scale is not None:
        value *= _per_channel(scale, codes)
    return value


def _per_channel(parameter: Tensor, codes: Tensor) -> Tensor:
    """A parameter in its own dtype: with float32 codes it computes in float32."""
    return parameter.reshape(-1 if parameter.numel() == 1 else codes.shape[1:])
