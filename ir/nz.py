"""The NZ format of an int8 cache: rows in pieces of 32 values, a plane of the block for each piece.

    ND  [N, S, heads, head_dim]              row r of block b lies at [b, r]
    NZ  [N, heads * head_dim / 32, S, 32]    its values 32p ... 32p + 31 lie at [b, p, r]

The same values in the same blocks and slots, so the runtime counts both alike. A program says which
a cache is by its expression, `cache()` or `cache_nz(heads)`. The source is op-plugin's
npu_scatter_pa_kv_cache.md, cache_mode PA_NZ.
"""

from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.program import expression_of, tensor_type
from kvc8.ir.types import TensorType, size

PIECE = 32  # int8 values: the 32 bytes that the NPU's matrix unit takes at a time


def nz_type(nd: TensorType) -> TensorType:
    """The type in NZ of a cache [N, S, heads, head_dim]."""
    blocks, slots, heads, head_dim = nd.shape
    return TensorType(nd.dtype, (blocks, int(heads) * int(head_dim) // PIECE, slots, PIECE))


def nz_row(cache: Node) -> tuple[int, int]:
    """Heads and head_dim of a cache in NZ.

    Raises IRError where its type is not that of such a cache, or holds no such number of heads.
    """
    type_, (heads,) = tensor_type(cache), expression_of(cache).args
    pieces = type_.shape[1] if len(type_.shape) == 4 else None
    wanted = (size("N"), pieces, size("S"), PIECE)
    if not isinstance(pieces, int) or not isinstance(heads, int) or type_.shape != wanted:
        what = f"is {type_} and an NZ cache is [N, pieces, S, {PIECE}]"
        raise IRError(cache.name, what, "make it so by nz_type")
    if heads < 1 or pieces % heads:
        what = f"{pieces} pieces of {PIECE} are no {heads} heads"
        raise IRError(cache.name, what, "write cache_nz(heads) with the number of heads")
    return heads, pieces * PIECE // heads


def is_nz_type(type_: TensorType) -> bool:
    """Whether a type is that of a cache in NZ."""
    shape = type_.shape
    return len(shape) == 4 and (shape[0], *shape[2:]) == (size("N"), size("S"), PIECE)


def to_nz(cache: Tensor) -> Tensor:
    """The cache [N, S, heads, head_dim] in NZ."""
    pieces: Tensor = cache.flatten(2).unflatten(2, (-1, PIECE))
    return pieces.transpose(1, 2).contiguous()


def from_nz(cache: Tensor, heads: int) -> Tensor:
    """The cache in NZ as [N, S, heads, head_dim]."""
    rows: Tensor = cache.transpose(1, 2).flatten(2).unflatten(2, (heads, -1))
    return rows
