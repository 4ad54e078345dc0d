"""How the attention ops' tensors lie in memory, and what of it is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.quantization import require_float
from kvc8.backends.npu.emulation.scaled_attention import pages
from kvc8.ir.errors import TargetError

_RANKS = {"BSH": 3, "TND": 3, "BSND": 4, "BNSD": 4}
NZ_RANK = 5  # of a cache [blocks, kv_heads, D / 32, block_size, 32]
_LARGEST_HEAD = 512  # npu_fused_infer_attention_score.md, which allows TND less: see attention.py


@dataclass(frozen=True)
class Layout:
    """How query, contiguous keys and values, and the output lie in memory, and their heads."""

    op: str
    name: str
    heads: int
    kv_heads: int

    def check_query(self, query: Tensor) -> None:
        """Raise unless query has this layout, its heads and a dtype that is allowed."""
        if query.ndim != _RANKS.get(self.name):
            raise TargetError(
                f"{self.op}",
                f"a query {list(query.shape)} is not {self.name}",
                "use BSH, BSND, BNSD or TND",
            )
        require_float(self.op, "query", query)
        if self.heads <= 0 or self.heads % self.kv_heads:
            raise TargetError(
                f"{self.op}",
                f"{self.heads} heads over {self.kv_heads} key and value heads",
                "give a multiple",
            )
        heads_at = {"BSND": 2, "BNSD": 1, "TND": 1}.get(self.name)
        dim = query.shape[-1] if heads_at else query.shape[-1] // self.heads
        if dim > _LARGEST_HEAD or (heads_at and query.shape[heads_at] != self.heads):
            heads = f"{self.heads} heads of up to {_LARGEST_HEAD}"
            what = f"a query {list(query.shape)} does not hold {heads}"
            raise TargetError(self.op, what, "reshape it")

    def rows(self, query: Tensor) -> int | None:
        """The query rows of each sequence, None in TND where each has its own number."""
        return None if self.name == "TND" else query.shape[2 if self.name == "BNSD" else 1]

    def sums(self, query: Tensor) -> Tensor:
        """Zeros, one for each row and head, that lie as query does: float32, D of 1."""
        last = self.heads if self.name == "BSH" else 1
        return torch.zeros_like(query[..., :last]).float()

    def heads_first(self, sums: Tensor) -> Tensor:
        """Such numbers as the ops give them: [B, N, S, 1], or [T, N, 1] in TND."""
        if self.name == "BSH":
            return sums.transpose(1, 2).unsqueeze(-1).contiguous()
        return sums.transpose(1, 2).contiguous() if self.name == "BSND" else sums

    def sequences(
        self, x: Tensor, heads: int, lengths: Sequence[int] | None, argument: str
    ) -> list[Tensor]:
        """Views [length, heads, D] of the sequences in x, in order; TND lengths are cumulative."""
        if self.name == "TND":
            ends = [] if lengths is None else list(lengths)
            starts = [0, *ends[:-1]]
            if not ends or ends[-1] != len(x) or sorted(ends) != ends or ends[0] < 0:
                raise TargetError(
                    f"{self.op}",
                    f"{argument} is {lengths} for {len(x)} rows in TND",
                    "give cumulative lengths that end there",
                )
            return [x[start:end] for start, end in zip(starts, ends, strict=True)]
        if self.name == "BSH":
            x = x.view(*x.shape[:2], heads, -1)
        batches = list((x.transpose(1, 2) if self.name == "BNSD" else x).unbind())
        if lengths is None:
            return batches
        lengths = self.checked(lengths, len(batches), argument)
        if not all(0 <= length <= len(batches[0]) for length in lengths):
            raise TargetError(
                f"{self.op}",
                f"{argument} is {lengths} for {len(batches[0])} rows a sequence",
                "give lengths that fit",
            )
        return [rows[:length] for rows, length in zip(batches, lengths, strict=True)]

    def checked(self, lengths: Sequence[int] | None, batch: int, argument: str) -> Sequence[int]:
        """The lengths, one a sequence, or an error."""
        if lengths is None or len(lengths) != batch:
            raise TargetError(
                f"{self.op}",
                f"{argument} is {lengths} for {batch} sequences",
                "give one length each",
            )
        return lengths

    def check_rows(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise unless the key and value rows of a sequence have the heads they should have."""
        wanted = (self.kv_heads, query.shape[-1])
        if key.shape[1:] != wanted or value.shape[1:] != wanted:
            raise TargetError(
                f"{self.op}",
                f"keys have heads {list(key.shape[1:])} and values {list(value.shape[1:])}",
                f"give {list(wanted)}, heads by head dimension",
            )

    def page_rows(self, cache: Tensor) -> Tensor:
        """A paged cache as [blocks, block_size, kv_heads, D], copied where it is in NZ format."""
        if cache.ndim == 3:
            return cache.view(*cache.shape[:2], self.kv_heads, -1)
        if cache.ndim == 4 and self.name in ("BNSD", "TND"):
            return cache.transpose(1, 2)
        if cache.ndim == NZ_RANK:
            return cache.permute(0, 3, 1, 2, 4).flatten(3)
        raise TargetError(
            f"{self.op}",
            f"a cache {list(cache.shape)} is not known in {self.name}",
            "make it [blocks, block_size, heads * head_dim]",
        )


@dataclass(frozen=True)
class Paging:
    """Where the rows of each sequence are in a paged cache."""

    op: str
    table: Tensor
    block_size: int

    def check(self, cache: Tensor, batch: int, query_rows: int | None) -> None:
        """Raise unless the block table and the blocks are such as the documents allow."""
        if self.table.dtype != torch.int32 or self.table.ndim != 2 or len(self.table) != batch:
            raise TargetError(
                f"{self.op}",
                f"block_table is {self.table.dtype}{list(self.table.shape)} for {batch} sequences",
                "give int32 [batch, blocks]",
            )
        if self.block_size != cache.shape[1]:
            raise TargetError(
                f"{self.op}",
                f"block_size is {self.block_size} and the cache has blocks of {cache.shape[1]}",
                "give the size of the cache",
            )
        step, most = self._block_sizes(cache, query_rows)
        if self.block_size % step or self.block_size > most:
            raise TargetError(
                f"{self.op}",
                f"blocks of {self.block_size} {cache.dtype} rows",
                f"use a multiple of {step} up to {most}",
            )

    def _block_sizes(self, cache: Tensor, query_rows: int | None) -> tuple[int, int]:
        """The step and the limit of block_size (the document on PageAttention, and on TND)."""
        if query_rows is None:
            return 16, 1024
        if query_rows > 1:
            return 128, 512
        return (32 if cache.dtype == torch.int8 else 16), 512

    def sequences(self, rows: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
        """The rows of each sequence, gathered when it is reached."""
        for table, length in zip(self.tables, lengths, strict=True):
            yield pages(rows, table, length)

    @cached_property
    def tables(self) -> list[list[int]]:
        """The blocks of each sequence: keys and values lie in the same."""
        found: list[list[int]] = self.table.tolist()
        return found
