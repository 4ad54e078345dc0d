"""Read stored tensors into memory of their own, whole or in pieces."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvc8.ir.checkpoint.model_files import place, shown
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import ModelError

PIECE = 16 << 20  # bytes


def load(tensor: StoredTensor) -> Tensor:
    """Read a stored tensor into memory of its own.

    Checkpoint.read maps it, and what is mapped stays resident long after it was used: a run over
    all weights would then seem to need as much memory as the model has.
    """
    flat = _read(tensor, 0, tensor.nbytes)
    return flat.reshape(tensor.shape)


def rows(tensor: StoredTensor, chosen: Tensor) -> Tensor:
    """Some rows of a stored tensor, in the order they are named."""
    width = tensor.nbytes // max(tensor.shape[0], 1)
    read = [_read(tensor, row * width, width) for row in chosen.tolist()]
    return torch.stack(read).reshape(-1, *tensor.shape[1:])


def row_blocks(tensor: StoredTensor, most: int = PIECE) -> Iterator[Tensor]:
    """A stored tensor by rows, as many at a time as about `most` bytes hold."""
    width = tensor.nbytes // max(tensor.shape[0], 1)
    for piece in pieces(tensor, max(most // max(width, 1), 1) * width):
        yield piece.reshape(-1, *tensor.shape[1:])


def pieces(tensor: StoredTensor, most: int = PIECE) -> Iterator[Tensor]:
    """A stored tensor's numbers in order, about `most` bytes at a time, in one dimension."""
    step = max(most // tensor.dtype.itemsize, 1) * tensor.dtype.itemsize
    for start in range(0, tensor.nbytes, step):
        yield _read(tensor, start, min(step, tensor.nbytes - start))


def _read(tensor: StoredTensor, start: int, count: int) -> Tensor:
    held = bytearray(count)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + start)
            got = file.readinto(held)
    except OSError as error:
        raise ModelError(
            place(tensor.file), f"cannot be read ({shown(error.strerror)})", "check its rights"
        ) from error
    if got != count:
        raise ModelError(place(tensor.file), "has become shorter", "copy the file again")
    return (
        torch.frombuffer(held, dtype=tensor.dtype) if held else torch.empty(0, dtype=tensor.dtype)
    )
