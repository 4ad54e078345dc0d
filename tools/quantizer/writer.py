"""Write a W8A8 model directory in msModelSlim's ascendV1 layout, whole or not at all.

One tensor is held at a time: the header says where each lies before any is made, and each is then
written to its place. Within the file tensors are sorted by the size of their elements, as
safetensors' own writer does it, so that each is aligned.
"""

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.errors import ModelError
from kvc8.ir.model_files import file_names, model_file, place, shown
from kvc8.ir.safetensors_files import DTYPES

WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8.safetensors", "quant_model_description.json"
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


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `out` if all goes well and vanishes otherwise."""
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            whole = Path(scratch) / "model"
            whole.mkdir()
            yield whole
            check_new(out)
            whole.rename(out)
    except OSError as error:
        why = shown(error.strerror or error)
        raise ModelError(f"{place(out)}: cannot be written ({why}); name another place") from error


def check_new(out: Path) -> None:
    """Raise ModelError where there is something at `out` already."""
    if out.exists() or out.is_symlink():
        raise ModelError(f"{place(out)}: exists already; remove it or name another directory")


def write_tensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file of `entries` while `tensors` gives them, each once, in any order."""
    header, places = _header(entries)
    left = {entry.name: entry for entry in entries}
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            entry = left.pop(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
            file.seek(places[name])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert not left, f"not written: {sorted(left)}"


def _header(entries: Sequence[Entry]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and at which byte of the file each tensor begins."""
    names = {dtype: name for name, dtype in DTYPES.items()}
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
    return head, {name: len(head) + start for name, start in starts.items()}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object as msModelSlim does, four spaces deep."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_small_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer and what else belongs to a model beside its weights; never its code."""
    for name in file_names(source):
        if any(fnmatch(name, pattern) for pattern in COPIED):
            file = model_file(source, name)
            assert file is not None, "file_names lists what is there"
            shutil.copyfile(file, destination / name)
