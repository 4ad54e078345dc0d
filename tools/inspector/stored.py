"""What the files of a model directory say by themselves, before anything is captured.

Nothing here imports torch, which takes seconds, until the values of scales are asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.compressed_tensors import kv_name as compressed_kv_name
from kvc8.ir.checkpoint.layouts import (
    KVName,
    Side,
    fact,
    kv_widths,
    layer_count,
    layer_index,
)
from kvc8.ir.checkpoint.msmodelslim import calibrated_of, kv_name, layout_of
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, Files, understand
from kvc8.ir.checkpoint.safetensors_files import StoredTensor, TensorFiles, is_blank
from kvc8.ir.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SCALE = 1 << 22  # bytes; what claims to hold more is no scale of a cache
LATENT_RANK = "kv_lora_rank"  # in the config.json of models that may cache latents


@dataclass(frozen=True)
class Stored:
    """A model directory by its JSON files and headers."""

    files: Files
    config: Mapping[str, object]  # of the language model: `text_config` where there is one
    layout: str
    layers: int  # 0 where config.json does not say
    widths: tuple[int, ...]  # kv_heads * head_dim of each layer; empty where that is not known
    names: Mapping[KVName, str]  # of KV scales and offsets
    calibrated: Calibrated | None
    checkpoint: Checkpoint | None = field(default=None, kw_only=True)  # None with a mistake
    mistake: ModelError | None = field(default=None, kw_only=True)  # why it makes no sense
    # Channels that a token's latents take in all layers, in the place of K and V; 0 until captured.
    latent: int = field(default=0, kw_only=True)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor by name."""
        return self.files.tensors

    @cached_property
    def values(self) -> Mapping[KVName, "Tensor"]:
        """KV scales and offsets in their stored dtypes."""
        reader = TensorFiles()
        return {key: reader.read(tensor).flatten() for key, tensor in self._small.items()}

    @property
    def _small(self) -> Mapping[KVName, StoredTensor]:
        found = {key: self.tensors[name] for key, name in self.names.items()}
        return {key: tensor for key, tensor in found.items() if tensor.nbytes <= LARGEST_SCALE}

    def has_offsets(self, layer: int) -> bool:
        """Whether K or V of a layer have an offset that is not zero."""
        small = self._small.items()
        offsets = {key: each for key, each in small if key[0] == layer and key[2] == "offset"}
        return any(not is_blank(t) and bool(self.values[k].any()) for k, t in offsets.items())

    def have(self, side: Side) -> list[int]:
        """The layers that have a scale for K or V."""
        return sorted(key[0] for key in self.names if key[1:] == (side, "scale"))

    @property
    def dtype(self) -> str:
        """What config.json says the model computes in."""
        found = self.config.get("dtype", self.config.get("torch_dtype"))
        return str(found or "float32").removeprefix("torch.")


def stored(files: Files, calibrated: Calibrated | None = None) -> Stored:
    """See what the files say; `calibrated` overrules what their layout implies."""
    text = files.config.get("text_config")
    config = text if isinstance(text, dict) else files.config
    checkpoint, mistake = _understood(files)
    names = _kv_names(files)
    return Stored(
        files=files,
        config=config,
        layout=checkpoint.layout if checkpoint else _layout(files),
        layers=_count(config),
        widths=_widths(files),
        names=names,
        calibrated=(calibrated or _calibrated(files, checkpoint)) if names else None,
        checkpoint=checkpoint,
        mistake=mistake,
    )


def _understood(files: Files) -> tuple[Checkpoint | None, ModelError | None]:
    try:
        return understand(files), None
    except ModelError as error:
        return None, error


def _kv_names(files: Files) -> dict[KVName, str]:
    """KV scales by layer and side; the first of two that claim one place."""
    read = kv_name if files.description_path else compressed_kv_name
    found: dict[KVName, str] = {}
    for name in files.tensors:
        if key := read(name) or kv_name(name):
            found.setdefault(key, name)
    return found


def _count(config: Mapping[str, object]) -> int:
    try:
        return layer_count(config, "")
    except ModelError:
        return 0


def _widths(files: Files) -> tuple[int, ...]:
    try:
        return kv_widths(files.config, "")
    except ModelError:
        return ()


def _layout(files: Files) -> str:
    """The layout of a directory that does not make sense: what its files look like."""
    if files.description_path:
        return layout_of(files.description_path, files.description, files.tensors)
    settings = files.config.get("quantization_config")
    compressed = isinstance(settings, dict) and "kv_cache_scheme" in settings
    return "compressed-tensors" if compressed else "float"


def _calibrated(files: Files, checkpoint: Checkpoint | None) -> Calibrated:
    if checkpoint and checkpoint.kv_calibrated:
        return checkpoint.kv_calibrated
    if not files.description_path:
        return "post-rope"
    return calibrated_of("", _layout(files), {})


def head_dim(known: Stored) -> int:
    """Channels of a head, as config.json says or implies; 1 where it does neither."""
    heads, hidden = (fact(known.config, n) for n in ("num_attention_heads", "hidden_size"))
    found = known.config.get("head_dim")
    if found is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        found = hidden // heads
    return found if isinstance(found, int) else 1


def kv_heads(known: Stored) -> int:
    """KV heads of a layer; 0 where there are none, config.json does not say, or layers differ."""
    if known.latent:
        return 0
    dim, widths = head_dim(known), set(known.widths)
    return widths.pop() // dim if len(widths) == 1 else 0


Kinds = Mapping[str, tuple[str, ...]]  # W8A8 or a dtype: the short names of linears stored so


ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down")


def _order(name: str) -> tuple[int, str]:
    return ORDER.index(name) if name in ORDER else len(ORDER), name


def linears(known: Stored) -> dict[int | None, Kinds]:
    """How the linears of each layer are stored, and those of no layer (None)."""
    found: dict[int | None, dict[str, dict[str, None]]] = {i: {} for i in range(known.layers)}
    for name, tensor in known.tensors.items():
        *path, module, part = ["", "", *name.split(".")]
        if part != "weight" or len(tensor.shape) < 2:
            continue
        kind = "W8A8" if tensor.kind == "int8" else tensor.kind
        layer, short = layer_index(path), module.removesuffix("_proj")
        found.setdefault(layer, {}).setdefault(kind, {})[short] = None
    return {
        layer: {kind: tuple(sorted(names, key=_order)) for kind, names in kinds.items()}
        for layer, kinds in found.items()
    }
