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
from kvc8.ir.program import Program, argument
from kvc8.ir.w8a8 import Range, kv_scale, part_types, quantize_linear
from kvc8.tools.quantizer.calibrate import Site, Statistics, load, sites
from kvc8.tools.quantizer.writer import (
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
        stored = self.checkpoint.tensors
        for name, top in self.kv.items():
            scale = kv_scale(top, self.dtype)
            yield f"{name}.kv_cache_scale", _sound(f"{name}.kv_cache_scale", scale)
            yield f"{name}.kv_cache_offset", torch.zeros_like(scale)
        for module, seen in self.linears.items():
            bias = load(stored[f"{module}.bias"]) if f"{module}.bias" in stored else None
            parts = quantize_linear(load(stored[f"{module}.weight"]), bias, seen, self.dtype)
            for part in ("weight_scale", "input_scale"):
                _sound(f"{module}.{part}", parts[part])
            yield from ((f"{module}.{part}", tensor) for part, tensor in parts.items())
        yield from ((name, load(stored[name])) for name in self.copied)


def _sound(name: str, scale: Tensor) -> Tensor:
    """A scale, which must be a number that its dtype holds."""
    if not bool(scale.isfinite().all()):
        kind = str(scale.dtype).removeprefix("torch.")
        raise ModelError(f"{name}: is beyond what {kind} holds; check the model's weights")
    return scale


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
    quantized = {f"{module}.weight" for module in linears}
    left_out = {*quantized, *not_copied(checkpoint)}
    copied = [name for name in checkpoint.tensors if name not in left_out]
    tops = _kv_tops(program, checkpoint, seen) if kv else {}
    return Plan(checkpoint, config_dtype(checkpoint), linears, tops, copied)


def not_copied(checkpoint: Checkpoint) -> list[str]:
    """The stored tensors that are left out: a tied lm_head's second copy, and whole numbers.

    Whole numbers in a float model are buffers, which its code makes again by itself; the
    description has no label for them.
    """
    found = [name for name, t in checkpoint.tensors.items() if not t.dtype.is_floating_point]
    heads = [name for name in checkpoint.tensors if name.endswith("lm_head.weight")]
    tables = [name for name in checkpoint.tensors if name.endswith("embed_tokens.weight")]
    if checkpoint.config.get("tie_word_embeddings") and heads and tables:
        same = torch.equal(checkpoint.read(heads[0]), checkpoint.read(tables[0]))
        found += heads[:1] if same else []
    return found


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
    made: Plan, out: Path, notes: Mapping[str, object], report: Callable[[int, str], None]
) -> None:
    """Write the model directory, with `notes` on how it was made in the description.

    `report` gets the number of bytes written so far, and the tensor written last.
    """
    entries = made.entries()

    def told() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, tensor in made.tensors():
            yield name, tensor
            done += tensor.nbytes
            report(done, name)

    with new_directory(out) as directory:
        write_tensors(directory / WEIGHTS, entries, told())
        write_json(directory / DESCRIPTION, _description(made, entries, notes))
        write_json(directory / "config.json", _config(made))
        copy_small_files(made.checkpoint.path, directory)


def _description(
    made: Plan, entries: Sequence[Entry], notes: Mapping[str, object]
) -> dict[str, object]:
    kind = "W8A8" if made.linears else "FLOAT"
    head: dict[str, object] = {"version": "1.0.0", "model_quant_type": kind}
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
