"""Make the tensors and settings of a W8A8 model with an int8 KV cache out of a float model."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.capture import config_dtype
from kvc8.ir.checkpoint import Checkpoint, kv_widths
from kvc8.ir.errors import ModelError
from kvc8.ir.model_files import place
from kvc8.ir.program import Program, argument, recipe_of
from kvc8.ir.recipe import stored_names
from kvc8.ir.w8a8 import Range, kv_scale, part_types, quantize_linear
from kvc8.tools.calibrate import Site, Statistics, sites
from kvc8.tools.quantize_writer import (
    DESCRIPTION,
    WEIGHTS,
    Entry,
    copy_small_files,
    new_directory,
    write_json,
    write_tensors,
)


@dataclass(frozen=True)
class Plan:
    """What is to be written: each tensor's entry, in the order of the description."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    linears: Mapping[str, Range]  # those to be quantized, by module, and their input's range
    kv: Mapping[str, Tensor]  # the absmax of K and V, by "model.layers.0.self_attn.k_proj"
    copied: Sequence[str]  # the stored tensors that stay as they are

    def entries(self) -> list[Entry]:
        """All tensors, by module and within a module in msModelSlim's order."""
        found = [entry for name, top in self.kv.items() for entry in self._kv(name, len(top))]
        found += [entry for module in self.linears for entry in self._linear(module)]
        stored = [self.checkpoint.tensors[name] for name in self.copied]
        found += [Entry(t.name, t.dtype, t.shape, "FLOAT") for t in stored]
        return sorted(found, key=lambda entry: _natural(entry.name.rpartition(".")[0]))

    def _kv(self, name: str, width: int) -> Iterator[Entry]:
        for part in ("kv_cache_scale", "kv_cache_offset"):
            yield Entry(f"{name}.{part}", self.dtype, (width,), "C8")

    def _linear(self, module: str) -> Iterator[Entry]:
        out, width = self.checkpoint.tensors[f"{module}.weight"].shape
        for part, (dtype, shape) in part_types(out, width, self.dtype).items():
            yield Entry(f"{module}.{part}", dtype, shape, "W8A8")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name; those of one linear at a time."""
        read, stored = self.checkpoint.read, self.checkpoint.tensors
        for name, top in self.kv.items():
            scale = kv_scale(top, self.dtype)
            yield f"{name}.kv_cache_scale", scale
            yield f"{name}.kv_cache_offset", torch.zeros_like(scale)
        for module, seen in self.linears.items():
            bias = read(f"{module}.bias") if f"{module}.bias" in stored else None
            parts = quantize_linear(read(f"{module}.weight"), bias, seen, self.dtype)
            yield from ((f"{module}.{part}", tensor) for part, tensor in parts.items())
        yield from ((name, read(name)) for name in self.copied)


def choose(
    program: Program, disabled: Sequence[str], down_proj: bool
) -> tuple[list[Site], list[Site]]:
    """The linears to quantize and those that stay float.

    A down_proj stays float unless `down_proj`, as msModelSlim's script has it. Where one of the
    linears that read the same value (q, k and v, say) stays float the others do too: runtimes pack
    them into one. Raises ModelError for a pattern that names no linear.
    """
    found = sites(program)
    for pattern in disabled:
        if not any(fnmatch(site.module, pattern) for site in found) and pattern != "lm_head":
            raise ModelError(
                f"--disable {pattern}: names no linear of this model; "
                "write one as model.layers.0.mlp.up_proj, or with * for any characters"
            )
    patterns = [*disabled, *([] if down_proj else ["*.down_proj"])]
    left = {s.source for s in found if any(fnmatch(s.module, p) for p in patterns)}
    chosen = [site for site in found if site.source not in left]
    return chosen, [site for site in found if site.source in left]


def plan(
    program: Program, checkpoint: Checkpoint, chosen: Sequence[Site], seen: Statistics, kv: bool
) -> Plan:
    """What to write for a model, given what was measured."""
    linears = {site.module: seen.inputs[site.source] for site in chosen}
    used = {name for node in program.parameters() for name in stored_names(recipe_of(node))}
    quantized = {f"{module}.weight" for module in linears}
    copied = [
        name
        for name, tensor in checkpoint.tensors.items()
        if name not in quantized
        and (name in used or _worth_keeping(checkpoint, name))
        and tensor.dtype.is_floating_point
    ]
    tops = _kv_tops(program, checkpoint, seen) if kv else {}
    return Plan(checkpoint, config_dtype(checkpoint), linears, tops, copied)


def _worth_keeping(checkpoint: Checkpoint, name: str) -> bool:
    """Whether to copy a tensor that the program does not read; a tied lm_head is a second copy."""
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    return not (tied and name.endswith(("lm_head.weight", "embed_tokens.weight")))


def _kv_tops(program: Program, checkpoint: Checkpoint, seen: Statistics) -> dict[str, Tensor]:
    widths = kv_widths(checkpoint.config, place(checkpoint.path, "config.json"))
    tops: dict[str, Tensor] = {}
    for write in program.calls(ops.cache_write):
        cache = argument(write, 0)
        side, _, layer = cache.name.partition("_cache_")
        top = seen.rows[cache]
        if len(top) != widths[int(layer)]:
            what = f"says {widths[int(layer)]} KV channels in layer {layer} and the model"
            raise ModelError(
                f"{place(checkpoint.path, 'config.json')}: {what} caches {len(top)}; "
                "correct num_key_value_heads and head_dim"
            )
        tops[f"{_attention(write)}.{side}_proj"] = top
    return tops


def _attention(write: Node) -> str:
    return str(write.meta["origin"])


def write_model(
    made: Plan, out: Path, notes: Mapping[str, object], progress: Callable[[Entry], None]
) -> None:
    """Write the model directory, with `notes` on how it was made in the description."""
    entries = made.entries()
    by_name = {entry.name: entry for entry in entries}

    def told() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in made.tensors():
            yield name, tensor
            progress(by_name[name])

    with new_directory(out) as directory:
        write_tensors(directory / WEIGHTS, entries, told())
        write_json(directory / DESCRIPTION, _description(made, entries, notes))
        write_json(directory / "config.json", _config(made))
        copy_small_files(made.checkpoint.path, directory)


def _description(
    made: Plan, entries: Sequence[Entry], notes: Mapping[str, object]
) -> dict[str, object]:
    head: dict[str, object] = {"version": "1.0.0", "model_quant_type": "W8A8"}
    if made.kv:
        head |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    labels = {entry.name: entry.label for entry in entries}
    tail = {"fa_quant_type": None, "group_size": 0, "kvc8": dict(notes)}
    return {**head, **labels, **tail}


def _config(made: Plan) -> dict[str, object]:
    """The float model's config, and the two entries by which MindIE knows W8A8 and C8."""
    config = {**made.checkpoint.config, "quantize": "w8a8"}
    if made.kv:
        kinds = {"kv_quant_type": "C8", "fa_quant_type": None, "group_size": 0}
        config["quantization_config"] = kinds
    return config


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 10 comes after layer 2."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
