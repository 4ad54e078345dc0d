"""Write the files of a W8A8 model directory in msModelSlim's layouts.

What will be written is known before any of it is made: the header of each safetensors file says
where a tensor lies, and each is written to its place when it is ready, in any order, again if
need be. So one tensor is held at a time, and a run that was killed writes the same bytes to the
same places. Within a file tensors are sorted by the size of their elements, as safetensors' own
writer does it, so that each is aligned.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.checkpoint.model_files import file_names, model_file
from kvc8.ir.checkpoint.safetensors_files import DTYPES, StoredTensor
from kvc8.ir.checkpoint.unmapped import pieces

WEIGHTS = "quant_model_weight_w8a8"
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "chat_template*", "generation_config.json", "*.model", "*.tiktoken"),
    *("LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written, and what the description calls it: FLOAT, W8A8 or C8."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    label: str

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class ModelWriter:
    """The weights files of a model, each tensor written to its place.

    One file, or with `most` bytes a file shards of about that size and an index, as msModelSlim
    names them with part_file_size.
    """

    def __init__(self, directory: Path, entries: Sequence[Entry], most: float | None) -> None:
        self._directory = directory
        self._entries = {entry.name: entry for entry in entries}
        self._places: dict[str, tuple[Path, int]] = {}
        self._left = set(self._entries)
        self._touched: set[Path] = set()
        shards = _shards(entries, most)
        for number, shard in enumerate(shards, 1):
            name = f"{WEIGHTS}.safetensors"
            if most is not None:
                name = f"{WEIGHTS}-{number:05}-of-{len(shards):05}.safetensors"
            self._lay_out(directory / name, shard)
        if most is not None:
            self._write_index()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the shape that its entry has, in the dtype that it has."""
        entry = self._entries[name]
        stored = tensor.to(entry.dtype)
        assert tuple(tensor.shape) == entry.shape, name
        # One float may be stored as another; a whole number stays the number that it is.
        both = tensor.is_floating_point() and entry.dtype.is_floating_point
        assert both or torch.equal(stored.to(tensor.dtype), tensor), name
        self._write(name, [stored])

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Write a stored tensor, in its entry's dtype, a piece at a time."""
        dtype = self._entries[name].dtype
        self._write(name, (piece.to(dtype) for piece in pieces(stored)))

    def settle(self) -> None:
        """Bring to disk what was written."""
        for path in self._touched:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._touched.clear()

    def check(self, resumed: bool) -> None:
        """Make sure that every tensor was written, as far as this run can know."""
        assert resumed or not self._left, f"not written: {sorted(self._left)}"

    def _write(self, name: str, parts: Iterable[Tensor]) -> None:
        path, start = self._places[name]
        with path.open("r+b") as file:
            file.seek(start)
            for part in parts:
                file.write(_bytes(part))
        self._left.discard(name)
        self._touched.add(path)

    def _lay_out(self, path: Path, entries: Sequence[Entry]) -> None:
        header, places, size = _header(entries)
        self._places |= {name: (path, start) for name, start in places.items()}
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(header)
            file.truncate(size)

    def _write_index(self) -> None:
        total = sum(entry.nbytes for entry in self._entries.values())
        weight_map = {name: self._places[name][0].name for name in self._entries}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self._directory / f"{WEIGHTS}.safetensors.index.json", index, 2)


def _shards(entries: Sequence[Entry], most: float | None) -> list[list[Entry]]:
    """Entries in their order, in files of at most `most` bytes; a larger tensor has its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if most is not None and shards[-1] and size + entry.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_tensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file of `entries` from `tensors`, and bring it to disk.

    A tensor may come in parts, one after the other.
    """
    header, places, size = _header(entries)
    with path.open("wb") as file:
        file.write(header)
        last = None
        for name, tensor in tensors:
            if name != last:
                file.seek(places[name])
            file.write(_bytes(tensor))
            last = name
            del tensor  # before the next one is made
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    found: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found


def _header(entries: Sequence[Entry]) -> tuple[bytes, dict[str, int], int]:
    """The head of a safetensors file, where each tensor begins, and how long the file is."""
    names = {getattr(torch, kind): name for name, (kind, _) in DTYPES.items()}
    fields, starts, end = {}, {}, 0
    for entry in sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name)):
        span = [end, end := end + entry.nbytes]
        fields[entry.name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        starts[entry.name] = span[0]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + end


def write_json(path: Path, content: Mapping[str, object], indent: int = 4) -> None:
    """Write a JSON object as msModelSlim does, four spaces deep."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def copy_small_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer and what else belongs to a model beside its weights; never its code."""
    for name in file_names(source):
        if any(fnmatch(name, pattern) for pattern in COPIED):
            file = model_file(source, name)
            assert file is not None, "file_names lists what is there"
            shutil.copyfile(file, destination / name)
