"""What the texts are at the border of two layers: in a file, from which a killed run goes on.

None of it is held in memory: a text is read back when a layer takes it. The system keeps as much of
the file in memory as it has to spare, and a run takes no more for many texts than for one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.types import DTYPE_NAMES, DTYPES


@dataclass(frozen=True)
class Span:
    """Where a value lies in the file; JSON has it as a list of these four."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass
class Activations:
    """The values of each text, by the name of their node."""

    path: Path
    spans: list[list[Span]] = field(default_factory=list)
    _size: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Write the next text's values."""
        at = []
        with self.path.open("ab" if self.spans else "wb") as file:
            for name, value in values.items():
                span = Span(name, DTYPE_NAMES[value.dtype], tuple(value.shape), self._size)
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                self._size += value.nbytes
                at.append(span)
        self.spans.append(at)

    def get(self, index: int) -> Mapping[str, Tensor]:
        """The values of a text."""
        with self.path.open("rb") as file:
            return {span.name: _read(file.fileno(), span) for span in self.spans[index]}

    def flush(self) -> None:
        """Bring the file to disk."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def reopen(path: Path, index: list[list[list[object]]]) -> Activations:
    """Open a file that an earlier run has written, by its spans as JSON gives them."""
    spans = [[Span(*entry) for entry in text] for text in index]  # type: ignore[arg-type]
    return Activations(path, spans)


def _read(descriptor: int, span: Span) -> Tensor:
    dtype = DTYPES[span.dtype]
    count = torch.Size(span.shape).numel() * dtype.itemsize
    held = bytearray(count)
    got = os.preadv(descriptor, [held], span.offset)
    assert got == count, f"{span.name}: {got} of {count} bytes"
    return torch.frombuffer(held, dtype=dtype).reshape(tuple(span.shape))
