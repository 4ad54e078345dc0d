"""What the KV cache of a program is made of, and what a token of it costs."""

from dataclasses import dataclass

import torch

from kvc8.ir.errors import IRError
from kvc8.ir.nz import PIECE, nz_row
from kvc8.ir.program import Program, is_nz, tensor_type
from kvc8.ir.token_cache import is_steps
from kvc8.ir.types import dtype_name, size

BLOCKS, BLOCK_SIZE = size("N"), size("S")
FLOAT16_BYTES = 2


@dataclass(frozen=True)
class Cache:
    """One cache: the K or the V of a layer, or the scales that tokens have there."""

    name: str
    heads: int
    head_dim: int
    dtype: torch.dtype
    format: str = "nd"  # or "nz": see ir/nz.py; "steps": a scale a token, [N, S, 1, 1]

    @property
    def bytes_per_token(self) -> int:
        """What one token takes."""
        return self.heads * self.head_dim * self.dtype.itemsize

    def shape(self, blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """The shape of its tensor: [blocks, block_size, heads, head_dim] in ND."""
        if self.format == "nz":
            return blocks, self.heads * self.head_dim // PIECE, block_size, PIECE
        return blocks, block_size, self.heads, self.head_dim

    def as_json(self) -> dict[str, str | int]:
        """What the manifest of an artifact says of it."""
        return {
            "name": self.name,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "dtype": dtype_name(self.dtype),
            "format": self.format,
        }


@dataclass(frozen=True)
class KVLayout:
    """The caches of a program, in the order of its inputs: of each layer K, then V.

    After those of all layers come, in the same order, the scales of tokens, where they have any.
    """

    caches: tuple[Cache, ...]

    @property
    def bytes_per_token(self) -> int:
        """What one token takes in all layers."""
        return sum(cache.bytes_per_token for cache in self.caches)

    @property
    def float16_bytes_per_token(self) -> int:
        """What one token would take in float16."""
        kept = (cache for cache in self.caches if cache.format != "steps")
        return sum(cache.heads * cache.head_dim * FLOAT16_BYTES for cache in kept)


def kv_layout(program: Program) -> KVLayout:
    """The layout that a program's cache placeholders ask for.

    Raises IRError where one is neither [N, S, heads, head_dim] nor of NZ format.
    """
    caches = []
    for node in program.caches():
        type_ = tensor_type(node)
        if is_nz(node):
            caches.append(Cache(node.name, *nz_row(node), type_.dtype, "nz"))
            continue
        if len(type_.shape) != 4 or type_.shape[:2] != (BLOCKS, BLOCK_SIZE):
            what = f"is {type_} and a cache is [N, S, heads, head_dim]"
            raise IRError(node.name, what, "give it that shape")
        heads, head_dim = type_.shape[2:]
        if not isinstance(heads, int) or not isinstance(head_dim, int):
            raise IRError(node.name, f"is {type_}", "its heads and head_dim must be numbers")
        kind = "steps" if is_steps(node) else "nd"
        caches.append(Cache(node.name, heads, head_dim, type_.dtype, kind))
    return KVLayout(tuple(caches))
