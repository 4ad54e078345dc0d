"""What a quantized model directory holds: each tensor's entry, the description, the config.

For an engine the directory has the form of tools/quantizer/engine_form.py. As the vendor's script
writes it there are two layouts: ascendV1, and safe_tensor, which older MindIE reads; the latter has
another name for the description, less in it, more in config.json, and each smoothed norm twice.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kvc8.ir.checkpoint.msmodelslim import NAME, OLD_NAME, tied_head
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.expression import stored_names
from kvc8.ir.program import Program, expression_of
from kvc8.tools.quantizer.engine_form import DESCRIPTIONS, config_for, description_for, kind_of
from kvc8.tools.quantizer.engines import Engine
from kvc8.tools.quantizer.layers import stages
from kvc8.tools.quantizer.writer import Entry, ModelWriter, copy_small_files, write_json

Layout = Literal["ascendV1", "safe_tensor"]
Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of a W8A8 linear, by last name
VENDORS: Mapping[Layout, str] = {"ascendV1": NAME, "safe_tensor": f"{OLD_NAME}w8a8.json"}


@dataclass(frozen=True)
class QuantPlan:
    """What is to be written."""

    checkpoint: Checkpoint
    program: Program
    dtype: torch.dtype  # of KV scales
    linears: Mapping[str, Parts]  # those in W8A8, by module
    kv: Mapping[str, int]  # channels of K and V, by "model.layers.0.self_attn.k_proj"
    floats: torch.dtype | None = None  # what float tensors are stored in; None as they are
    smoothed: bool = False  # norms have a bias, by which MindIE knows that they are smoothed
    layout: Layout = "ascendV1"
    asymmetric: bool = False  # K and V have offsets
    notes: Mapping[str, object] = field(default_factory=dict)  # on how it was made
    labels: Mapping[str, str] = field(default_factory=dict)  # of linears that are not W8A8

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the model's modules and msModelSlim's within a module."""
        left = set(not_copied(self.checkpoint))
        stored: dict[str, list[StoredTensor]] = {}
        for name, tensor in self.checkpoint.tensors.items():
            if name not in left:
                stored.setdefault(name.rpartition(".")[0], []).append(tensor)
        rank = _ranks(self.program)
        modules = sorted({*stored, *self.kv}, key=lambda m: (rank.get(m, len(rank)), _natural(m)))
        return [entry for m in modules for entry in self._module(m, stored.get(m, []))]

    def _module(self, module: str, stored: list[StoredTensor]) -> Iterator[Entry]:
        if module in self.kv:
            for part in ("kv_cache_scale", "kv_cache_offset"):
                yield Entry(f"{module}.{part}", self.dtype, (self.kv[module],), "C8")
        floats = [Entry(t.name, self.floats or t.dtype, t.shape, "FLOAT") for t in stored]
        parts = self.linears.get(module, {})
        label = self.labels.get(module, "W8A8")
        new = [Entry(f"{module}.{part}", *type_, label) for part, type_ in parts.items()]
        names = {entry.name for entry in new}
        yield from new[:1]  # the weight; a bias follows it
        yield from (entry for entry in floats if entry.name not in names)
        yield from new[1:]
        if self.smoothed and is_norm(module):
            yield from self._norm(module, stored[0])

    def _norm(self, module: str, weight: StoredTensor) -> Iterator[Entry]:
        """A smoothed norm's bias; it is float32 in any model, as torch.zeros gave it."""
        bias = torch.float32
        yield Entry(f"{module}.bias", bias, weight.shape, "FLOAT")
        if self.layout == "safe_tensor":
            # msModelSlim wraps a norm, and this layout saves wrapper and wrapped.
            dtype = self.floats or weight.dtype
            yield Entry(f"{module}.module.weight", dtype, weight.shape, "W8A8")
            yield Entry(f"{module}.module.bias", bias, weight.shape, "W8A8")

    def finish(self, directory: Path, engine: Engine | None) -> None:
        """Write what lies beside the weights, for an engine or as the vendor's script does."""
        name, description, config = self._vendors()
        if engine:
            name = DESCRIPTIONS[engine]
            description = description_for(engine, self._labels().items(), self.notes)
            config = config_for(engine, self.checkpoint.config, self._labels().values())
        write_json(directory / name, description)
        write_json(directory / "config.json", config)
        copy_small_files(self.checkpoint.path, directory)

    def _labels(self) -> dict[str, str]:
        """What each tensor is called, in the order they are written in."""
        labels = {entry.name: entry.label for entry in self.entries()}
        if tied_head("lm_head.weight", self.checkpoint.config):
            # No such tensor is stored; vllm-ascend looks for the label and fails without it.
            labels.setdefault("lm_head.weight", "FLOAT")
        return labels

    def _vendors(self) -> tuple[str, dict[str, object], dict[str, object]]:
        """The description's name, the description and the config as msModelSlim writes them.

        With ascendV1 it leaves C8 to the description.
        """
        head: dict[str, object] = {"version": "1.0.0"} if self.layout == "ascendV1" else {}
        head["model_quant_type"] = self._kind
        if self.kv:
            head |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
        tail: dict[str, object] = {}
        if self.layout == "ascendV1":
            tail = {"fa_quant_type": None, "group_size": 0}
        kind = "w8a8" if self._kind == "FLOAT" else self._kind.lower()
        config = {**self.checkpoint.config, "quantize": kind}
        if self.kv and self.layout == "safe_tensor":
            kinds = {"kv_quant_type": "C8", "fa_quant_type": None, "group_size": 0}
            config["quantization_config"] = kinds
        return VENDORS[self.layout], {**head, **self._labels(), **tail}, config

    @property
    def _kind(self) -> str:
        """The label that msModelSlim gives the whole."""
        return kind_of(self.labels.get(module, "W8A8") for module in self.linears)


def copy_rest(
    plan: QuantPlan, writer: ModelWriter, entries: Iterable[Entry], made: set[str]
) -> None:
    """Copy the float tensors that the recipe has not made."""
    stored = plan.checkpoint.tensors
    for entry in entries:
        if entry.label == "FLOAT" and entry.name in stored and entry.name not in made:
            writer.copy(entry.name, stored[entry.name])


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


def is_norm(module: str) -> bool:
    """Whether a module is a norm of whole layers, as msModelSlim finds them by name.

    It cannot read models that norm q and k.
    """
    last = module.rpartition(".")[2]
    return "norm" in last and last not in ("q_norm", "k_norm")


def _ranks(program: Program) -> dict[str, int]:
    """For each module its place in the model: embeddings, the layers, and what comes after."""
    first = stages(program)
    at = {call: i for i, stage in enumerate(first) for call in stage.calls}
    order: list[tuple[int, str]] = []
    for parameter in program.parameters():
        used = min((at.get(user, len(first)) for user in parameter.users), default=len(first))
        names = stored_names(expression_of(parameter))
        order += [(used, name.rpartition(".")[0]) for name in names]
    modules = [module for _, module in sorted(order, key=lambda entry: entry[0])]
    return {module: i for i, module in enumerate(dict.fromkeys(modules))}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 10 comes after layer 2."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
