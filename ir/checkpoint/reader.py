"""Open a model directory: its config, where its tensors lie, and how it is quantized.

What the directory holds tells its layout; no flag does. Nothing in it is executed, and weights are
not touched until they are read. An entry that cannot be accounted for is an error or a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.compressed_tensors import read_compressed_tensors
from kvc8.ir.checkpoint.layouts import (
    Calibrated,
    Granularity,
    KVScale,
    LinearQuant,
    Quantization,
    kv_widths,
    without_labels,
)
from kvc8.ir.checkpoint.model_files import file_names, listed, model_file, place, read_json, shown
from kvc8.ir.checkpoint.msmodelslim import NAME, OLD_NAME, read_description
from kvc8.ir.checkpoint.safetensors_files import StoredTensor, TensorFiles, read_header, read_index
from kvc8.ir.errors import ModelError, ModelWarning

if TYPE_CHECKING:  # takes a second, and only what is read needs it
    import torch

__all__ = [
    "Calibrated",
    "Checkpoint",
    "Files",
    "Granularity",
    "KVScale",
    "LinearQuant",
    "StoredTensor",
    "kv_widths",
    "open_checkpoint",
    "read_files",
    "understand",
]

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
MSMODELSLIM_WEIGHTS = "quant_model_weight"
MSMODELSLIM_PARTS = ("kv_cache_scale", "kv_cache_offset", "deq_scale", "quant_bias")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, opened. Mappings are not to be changed."""

    path: Path
    config: Mapping[str, object]
    layout: str  # float, ascendV1, safe_tensor, msmodelslim-v1 or compressed-tensors
    tensors: Mapping[str, StoredTensor]
    w8a8: Mapping[str, LinearQuant]  # by module, e.g. "model.layers.0.self_attn.q_proj"
    kv: Mapping[int, tuple[KVScale, KVScale]]  # K and V by layer; empty without C8
    kv_calibrated: Calibrated | None  # where K was observed; None without C8
    warnings: tuple[ModelWarning, ...]
    kvc8: Mapping[str, object] = field(default_factory=dict)  # what kvc8-quantize noted
    _files: TensorFiles = field(default_factory=TensorFiles, repr=False, compare=False)

    @cached_property
    def inputs(self) -> Mapping[str, tuple[str, str]]:
        """The input scale and offset of each linear that has them, by module.

        Linears side by side whose parameters are equal bit for bit (q, k and v, say) share the
        names of the first, so that what is equal can be seen without its values.
        """
        shared: dict[tuple[str, str], tuple[str, str]] = {}
        found = {}
        for module, linear in self.w8a8.items():
            if linear.input_scale is None or linear.input_offset is None:
                continue
            names = linear.input_scale, linear.input_offset
            bits = repr([(t.dtype, t.tolist()) for t in map(self.read, names)])
            found[module] = shared.setdefault((module.rpartition(".")[0], bits), names)
        return found

    def read(self, name: str) -> torch.Tensor:
        """Map a stored tensor into memory, in its stored dtype and shape, without a copy.

        Raises ModelError where there is no such tensor, or its file is no longer what it was.
        """
        if name not in self.tensors:
            raise ModelError(
                place(self.path), f"has no tensor {shown(name)}", "check the model's type"
            )
        return self._files.read(self.tensors[name])


@dataclass(frozen=True)
class Files:
    """What the files of a model directory hold, before any of it is trusted to make sense."""

    path: Path
    config: Mapping[str, object]
    description_path: Path | None  # of msModelSlim's description; None where there is none
    description: Mapping[str, object]
    tensors: Mapping[str, StoredTensor]
    warnings: tuple[ModelWarning, ...]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the model directory at `path`, reading JSON and headers only.

    Raises ModelError where a file is missing or damaged, or the parts disagree.
    """
    return understand(read_files(path))


def read_files(path: Path) -> Files:
    """Read the JSON files and the headers of the directory at `path`.

    Raises ModelError where a file is missing or damaged; that they agree is not checked.
    """
    names = file_names(path)
    config_path = model_file(path, "config.json")
    if config_path is None:
        raise ModelError(
            place(path), "has no config.json", "name the directory of a Hugging Face model"
        )
    config = read_json(config_path)
    description, unread = _find_description(path, names, config)
    tensors, warnings = _read_weights(path, names, description is not None)
    labels = read_json(description) if description else {}
    return Files(path, config, description, labels, tensors, (*unread, *warnings))


def understand(files: Files) -> Checkpoint:
    """Work out what the files mean; raises ModelError where they disagree."""
    found = _quantization(files)
    _check_switch(place(files.path, "config.json"), files.config, found)
    return Checkpoint(
        path=files.path,
        config=files.config,
        layout=found.layout,
        tensors=files.tensors,
        w8a8=found.w8a8,
        kv=found.kv,
        kv_calibrated=found.kv_calibrated,
        warnings=(*files.warnings, *found.warnings),
        kvc8=found.kvc8,
    )


def _find_description(
    directory: Path, names: list[str], config: Mapping[str, object]
) -> tuple[Path | None, list[ModelWarning]]:
    """Find msModelSlim's description as MindIE does: the new name, then `quantize`'s."""
    wanted = (NAME, f"{OLD_NAME}{config.get('quantize')}.json")
    there = [name for name in names if name.startswith(OLD_NAME) and name.endswith(".json")]
    there += [NAME] if NAME in names else []
    if not there:
        return None, []
    chosen = next((name for name in wanted if name in there), there[0])
    if chosen not in wanted and len(there) > 1:
        raise ModelError(
            place(directory), f"holds {listed(there)}", "keep the one that describes the weights"
        )
    rest = [name for name in there if name != chosen]
    what = f"{listed(rest)} is not read beside {chosen}"
    warning = ModelWarning(place(directory), what, "remove it")
    return model_file(directory, chosen), [warning] if rest else []


def _read_weights(
    directory: Path, names: list[str], described: bool
) -> tuple[dict[str, StoredTensor], list[ModelWarning]]:
    """Read the headers of the weights files; gives tensors by name, and warnings."""
    chosen = _find_weights(directory, names, described)
    path = model_file(directory, chosen)
    assert path is not None, "names lists what is there"
    if chosen.endswith(INDEX):
        tensors, warnings = read_index(directory, path)
    else:
        tensors, warnings = read_header(path), []
    if not tensors:
        raise ModelError(place(path), "holds no tensors", "copy the file again")
    used = {tensor.file.name for tensor in tensors.values()} | {chosen}
    if rest := [name for name in names if name.endswith((SUFFIX, INDEX)) and name not in used]:
        what = f"{listed(rest)} is not read"
        warnings.append(ModelWarning(place(directory), what, "check that it is not needed"))
    return tensors, warnings


def _find_weights(directory: Path, names: list[str], described: bool) -> str:
    """Choose the index or the single file that holds the weights."""
    if described:
        ours = [name for name in names if name.startswith(MSMODELSLIM_WEIGHTS)]
        for suffix in (INDEX, SUFFIX):
            found = [name for name in ours if name.endswith(suffix)]
            if len(found) == 1:
                return found[0]
            if found:
                raise ModelError(
                    place(directory),
                    f"holds {listed(found)} and no one file that says which to read",
                    "copy the index too, or remove what is not the model's",
                )
    for name in ("model" + SUFFIX, "model" + INDEX):  # the order in which transformers looks
        if name in names:
            return name
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    why = f" but {listed(pickles)}, which kvc8 does not run" if pickles else " and no index"
    raise ModelError(
        place(directory), f"has no model.safetensors{why}", "save the model as safetensors"
    )


def _quantization(files: Files) -> Quantization:
    """Read how the model is quantized, by the rules of the layout that its files show."""
    path, config, tensors = files.path, files.config, files.tensors
    if files.description_path is not None:
        return read_description(files.description_path, files.description, tensors, config)
    where = place(path, "config.json")
    settings = _quantization_config(where, config)
    if settings.get("quant_method") == "compressed-tensors":
        return read_compressed_tensors(settings, tensors, config, where)
    method = settings.get("quant_method")
    if method is not None or (settings and "kv_quant_type" not in settings):
        raise ModelError(
            where,
            f"quantization_config has quant_method {shown(method)}, which kvc8 does not read",
            "take the float model and quantize it with kvc8-quantize",
        )
    if parts := [name for name in tensors if name.endswith(MSMODELSLIM_PARTS)]:
        raise ModelError(
            place(path),
            f"holds {listed(parts)} of a quantized model and no {NAME}",
            "copy that file too",
        )
    warnings = without_labels(tensors.values(), place(path))
    if "quantize" in config and config["quantize"] not in (None, "float"):
        kind = f"quantize is {shown(config['quantize'])} and the model is plain float"
        do = "remove it, or copy the quantized model's files"
        warnings.append(ModelWarning(where, kind, do))
    return Quantization("float", warnings=tuple(warnings))


def _quantization_config(where: str, config: Mapping[str, object]) -> Mapping[str, object]:
    settings = config.get("quantization_config")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ModelError(
            where,
            f"quantization_config is {shown(settings)} and should be an object",
            "copy the file again",
        )
    return settings


def _check_switch(where: str, config: Mapping[str, object], found: Quantization) -> None:
    """Check that the checkpoint has KV scales where config.json says C8."""
    kind = _quantization_config(where, config).get("kv_quant_type")
    if kind == "C8" and not found.kv:
        raise ModelError(
            where,
            "kv_quant_type is C8 and the model has no KV scales",
            "copy its quant_model_description.json too, or remove kv_quant_type",
        )
