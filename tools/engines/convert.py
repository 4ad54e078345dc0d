"""A quantized directory in the form that an engine wants, without measuring anything again.

Nothing but scales, zero points and small tensors of an unfit dtype changes. A weights file in which
nothing does is linked, and any other is written again, for engines read every tensor of every
file: an old scale must not stay behind in one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.checkpoint.layouts import Activations
from kvc8.ir.checkpoint.model_files import file_names, place
from kvc8.ir.checkpoint.msmodelslim import tied_head
from kvc8.ir.checkpoint.new_directory import PartialDirectory, new_directory
from kvc8.ir.checkpoint.reader import INDEX, Checkpoint
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import STEPS
from kvc8.tools.engines.mend import Mended, mend
from kvc8.tools.quantizer.engine_form import (
    DESCRIPTIONS,
    check_dtype,
    config_for,
    description_for,
    entries_for,
)
from kvc8.tools.quantizer.engines import NAMES, PACKED, Engine
from kvc8.tools.quantizer.writer import Entry, copy_small_files, write_json, write_tensors

LABELS: Mapping[Activations, str] = {
    "static": "W8A8",
    "dynamic": "W8A8_DYNAMIC",
    "mixed": "W8A8_MIX",
}
LAYOUTS = ("ascendV1", "safe_tensor", "msmodelslim-v1")


@dataclass(frozen=True)
class Converted:
    """What was done: KV scales that were mended, and weights files linked and written."""

    mended: Mended
    linked: int
    written: int


def convert(checkpoint: Checkpoint, engine: Engine, out: Path) -> Converted:
    """Write the checkpoint to `out` as `engine` wants it.

    Raises ModelError for what the engine would misread however it is written.
    """
    if checkpoint.layout not in LAYOUTS:
        what = f"is {checkpoint.layout}, and no directory of msModelSlim's layouts"
        raise ModelError(place(checkpoint.path), what, "quantize it with kvc8-quantize")
    dtype = config_dtype(checkpoint)
    check_dtype(dtype, place(checkpoint.path, "config.json"), engine)
    _check_inputs(checkpoint, engine)
    mended = mend(checkpoint, dtype)
    entries = entries_for(_labeled(checkpoint), dtype, engine)
    with new_directory(out) as part:
        linked = _write_weights(part, checkpoint, entries, mended)
        labels = {entry.name: entry.label for entry in entries}
        if tied_head("lm_head.weight", checkpoint.config):
            labels.setdefault("lm_head.weight", "FLOAT")
        description = description_for(engine, labels.items(), _notes(checkpoint, mended))
        write_json(part.path / DESCRIPTIONS[engine], description)
        config = config_for(engine, checkpoint.config, labels.values())
        write_json(part.path / "config.json", config)
        copy_small_files(checkpoint.path, part.path)
    return Converted(mended, linked, len(_by_file(checkpoint)) - linked)


def _notes(checkpoint: Checkpoint, mended: Mended) -> dict[str, object]:
    """What the description says of K, and of what was done to it."""
    notes = dict(checkpoint.kvc8)
    if checkpoint.kv:
        notes["kv_calibrated"] = "post-rope"  # where it was, or where its bounds hold
    if mended.widened:
        notes["k_scales"] = "bounds after RoPE of what was measured before it"
    if mended.symmetric:
        notes["zero_points"] = "given up for wider scales"
    return notes


def _check_inputs(checkpoint: Checkpoint, engine: Engine) -> None:
    """An engine keeps one input scale for the linears that it packs: theirs must be equal."""
    for module in checkpoint.w8a8:
        parent, _, last = module.rpartition(".")
        for group in (group for group in PACKED if group[0] == last):
            packed = [
                f"{parent}.{part}" for part in group if f"{parent}.{part}" in checkpoint.inputs
            ]
            if len({checkpoint.inputs[name] for name in packed}) > 1:
                what = f"{', '.join(group)} have other input scales, and {NAMES[engine]} keeps one"
                raise ModelError(parent, what, "quantize them again with kvc8-quantize")


def _labeled(checkpoint: Checkpoint) -> list[Entry]:
    """Every tensor that an engine wants, and what it is called."""
    parts = {
        name: LABELS[linear.activations]
        for linear in checkpoint.w8a8.values()
        for part, name in linear.tensors.items()
        if part != "bias"
    }
    caches = [cache for pair in checkpoint.kv.values() for cache in pair]
    parts |= {name: "C8" for c in caches for name in (c.scale, c.offset) if name}
    return [
        Entry(name, tensor.dtype, _shape(tensor), parts.get(name, "FLOAT"))
        for name, tensor in checkpoint.tensors.items()
        if not (".module." in name and name.replace(".module.", ".") in checkpoint.tensors)
    ]


def _shape(tensor: StoredTensor) -> tuple[int, ...]:
    """One number is [1], and a scale a row is [out, 1], as parameters are."""
    part = tensor.name.rpartition(".")[2]
    if part in ("weight_scale", "weight_offset"):
        return (math.prod(tensor.shape), 1)
    return tensor.shape or (1,)


def _by_file(checkpoint: Checkpoint) -> dict[Path, list[StoredTensor]]:
    files: dict[Path, list[StoredTensor]] = {}
    for tensor in checkpoint.tensors.values():
        files.setdefault(tensor.file, []).append(tensor)
    return files


def _write_weights(
    part: PartialDirectory, checkpoint: Checkpoint, entries: list[Entry], mended: Mended
) -> int:
    """Link or write each weights file, and the index where there is one; gives the links."""
    wanted = {entry.name: entry for entry in entries}
    zeros = (
        {c.offset for pair in checkpoint.kv.values() for c in pair} if mended.symmetric else set()
    )
    new = {*mended.scales, *zeros}
    linked, files = 0, _by_file(checkpoint)
    for file, tensors in files.items():
        here = [wanted[tensor.name] for tensor in tensors if tensor.name in wanted]
        if all(_stays(tensor, wanted, new) for tensor in tensors):
            part.link(file.name, file)
            linked += 1
        elif here:
            write_tensors(part.path / file.name, here, _tensors(here, checkpoint, mended))
    for index in [name for name in file_names(checkpoint.path) if name.endswith(INDEX)]:
        weight_map = {name: checkpoint.tensors[name].file.name for name in wanted}
        total = sum(entry.nbytes for entry in entries)
        write_json(part.path / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return linked


def _stays(tensor: StoredTensor, wanted: Mapping[str, Entry], new: set[str | None]) -> bool:
    entry = wanted.get(tensor.name)
    same = entry is not None and (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
    return same and tensor.name not in new


def _tensors(
    entries: list[Entry], checkpoint: Checkpoint, mended: Mended
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, each as it is to be written."""
    for entry in entries:
        stored = checkpoint.tensors[entry.name]
        part = entry.name.rpartition(".")[2]
        if entry.name in mended.scales:
            value = mended.scales[entry.name]
        elif part == "kv_cache_offset" and mended.symmetric:
            value = torch.zeros(entry.shape)
        elif part == "deq_scale":
            value = _deq_scale(load(stored), entry.dtype)
        else:
            value = load(stored)
        yield entry.name, _cast(value.reshape(entry.shape), entry, stored)


def _deq_scale(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32, or its bits in an int64, as the other where `dtype` is that."""
    if stored.dtype is dtype:
        return stored
    if dtype is torch.float32:
        return stored.to(torch.int32).view(torch.float32)
    return stored.view(torch.int32).to(torch.int64)


def _cast(value: Tensor, entry: Entry, stored: StoredTensor) -> Tensor:
    """The value in its new dtype; raises ModelError where an offset does not fit."""
    if entry.name.endswith("kv_cache_scale"):
        value = STEPS["round_up"](value.float(), entry.dtype)
    found = value.to(entry.dtype)
    whole = not entry.dtype.is_floating_point
    if whole and not torch.equal(found.to(value.dtype), value):
        what = f"{entry.name} is no whole number from -128 to 127, as an engine's parameter is"
        raise ModelError(place(stored.file), what, "quantize the model again")
    return found
