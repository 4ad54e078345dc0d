"""Read safetensors files: where each tensor lies, and the tensor itself, memory-mapped.

safetensors gives tensors but not their place in the file, which the artifact and ONNX's external
data need. So the header is read here too, and checked as strictly as safetensors checks it: a JSON
object after eight bytes of length; each tensor's bytes inside the file, as many as its shape and
dtype ask for, without overlaps or holes. Only headers are read; weights stay on disk.

torch, which takes a second to import, is imported where a tensor is read: what headers alone tell
to be wrong is refused before.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from kvc8.ir.checkpoint.model_files import (
    LARGEST_JSON,
    listed,
    model_file,
    parse_json,
    place,
    read_json,
    shown,
)
from kvc8.ir.errors import ModelError, ModelWarning

if TYPE_CHECKING:
    import torch

SMALL = 1 << 20  # bytes; up to it a tensor is read and not mapped
DTYPES: Mapping[str, tuple[str, int]] = {  # torch's name, and bytes
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: `nbytes` bytes of `file` from byte `offset`, row-major, little-endian."""

    name: str
    file: Path
    kind: str  # its dtype by torch's name, "float16"
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype, which who asks only whether it is this or that can tell by `kind`."""
        import torch

        found = getattr(torch, self.kind)
        assert isinstance(found, torch.dtype)
        return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read where each tensor of a safetensors file lies, by name, in the order of their bytes.

    Raises ModelError where the file is cut short, its header is damaged, or tensors overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            header = file.read(length) if length <= min(LARGEST_JSON, size - 8) else None
    except OSError as error:
        raise ModelError(
            place(path), f"cannot be read ({shown(error.strerror)})", "check its rights"
        ) from error
    if header is None:
        raise ModelError(
            place(path), f"is {size} bytes long, too short for its own header", "copy it again"
        )
    entries = parse_json(header, f"{place(path)} (header)")
    entries.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _entry(path: Path, name: str, entry: object, data: int) -> StoredTensor:
    """Check one entry of the header of `path`, whose tensors begin at byte `data`."""
    where = place(path)
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), _sizes(fields.get("shape"))
    span = _sizes(fields.get("data_offsets"))
    if len(fields) != 3 or shape is None or span is None or len(span) != 2:
        what = f"{shown(name)} has a damaged header entry"
        raise ModelError(where, what, "copy the file again")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        what = f"{shown(name)} has dtype {shown(dtype)}, which kvc8 does not read"
        raise ModelError(where, what, f"save it as one of {', '.join(DTYPES)}")
    kind, size = DTYPES[dtype]
    nbytes = math.prod(shape) * size
    if span[1] - span[0] != nbytes:
        span_ = f"those from {span[0]} to {span[1]}"
        what = f"{shown(name)} takes {nbytes} bytes and its header gives it {span_}"
        raise ModelError(where, what, "copy the file again")
    return StoredTensor(name, path, kind, shape, data + span[0], nbytes)


def _sizes(value: object) -> tuple[int, ...] | None:
    """Read a list of sizes; None where it is anything else."""
    if not isinstance(value, list) or len(value) > 64:
        return None
    good = all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    return tuple(value) if good else None


def _check_cover(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Check that tensors, sorted by offset, fill the bytes from `start` to `size` exactly."""
    end, last = start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a hole after"
            raise ModelError(
                place(path), f"{shown(tensor.name)} {what} {last}", "copy the file again"
            )
        end, last = end + tensor.nbytes, shown(tensor.name)
    if end != size:
        raise ModelError(
            place(path),
            f"is {size} bytes long and its header describes {end}",
            "copy the file again",
        )


def read_index(directory: Path, index: Path) -> tuple[dict[str, StoredTensor], list[ModelWarning]]:
    """Read every shard that `index` names: tensors by name, and warnings.

    Raises ModelError where the index is damaged, or names a file that is missing or lies outside
    the directory, or a tensor that its shard does not hold.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(place(index), "has no weight_map", "copy the file again")
    tensors: dict[str, StoredTensor] = {}
    left: list[str] = []
    for shard, names in _by_shard(index, weight_map).items():
        path = model_file(directory, shard, named_by=index)
        if path is None:
            raise ModelError(
                place(index), f"names {shown(shard)}, which is not there", "copy that file too"
            )
        header = read_header(path)
        if missing := sorted(names - set(header)):
            raise ModelError(
                place(index),
                f"says {shown(shard)} holds {listed(missing)}, which it does not",
                "copy the directory again",
            )
        tensors |= {name: tensor for name, tensor in header.items() if name in names}
        left += sorted(set(header) - names)
    what = f"leaves out {listed(left)} of its shards"
    warning = ModelWarning(place(index), what, "kvc8 leaves it out too")
    return tensors, [warning] if left else []


def _by_shard(index: Path, weight_map: Mapping[str, object]) -> dict[str, set[str]]:
    """Turn the index's map around: the tensors that each shard should hold."""
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ModelError(
                place(index), f"gives {shown(name)} no file name", "copy the file again"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def is_blank(tensor: StoredTensor) -> bool:
    """Whether all bytes of a small tensor are zero, and so are its values: told without torch."""
    return not any(_bytes_of(tensor))


def _read_small(tensor: StoredTensor) -> torch.Tensor:
    import torch

    return torch.frombuffer(_bytes_of(tensor), dtype=tensor.dtype).reshape(tensor.shape)


def _bytes_of(tensor: StoredTensor) -> bytearray:
    held = bytearray(tensor.nbytes)
    with tensor.file.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(tensor.offset)
        got = file.readinto(held)
    if got != tensor.nbytes:
        raise ModelError(place(tensor.file), "has become shorter", "copy the file again")
    return held


class TensorFiles:
    """Open safetensors files, each opened on its first use and kept."""

    def __init__(self) -> None:
        self._open: dict[Path, safe_open] = {}

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Map `tensor` into memory: nothing is copied, and pages are read when they are used.

        A small one is read instead. A page fault reads far ahead, which a compile that looks at
        thousands of scales between gigabytes of weights would wait for.
        """
        try:
            if 0 < tensor.nbytes <= SMALL:
                return _read_small(tensor)
            if tensor.file not in self._open:
                self._open[tensor.file] = safe_open(tensor.file, framework="pt")
            file = self._open[tensor.file]
            value: torch.Tensor = file.get_tensor(tensor.name)  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise ModelError(
                place(tensor.file),
                f"{shown(tensor.name)} cannot be read ({shown(error)})",
                "copy the file again",
            ) from error
        return value
