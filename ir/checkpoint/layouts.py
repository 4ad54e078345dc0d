"""What quantization parameters a checkpoint holds, whatever its layout calls them.

A layout gives the names of KV scales; `kv_scales` checks them all alike: both K and V of every
layer, the width that config.json implies, a dtype that can hold a scale. Here are also the layouts
that need no description file: plain float, and compressed-tensors' `kv_cache_scheme`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from kvc8.ir.checkpoint.model_files import listed, place, positive, shown
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import ModelError, ModelWarning

FLOATS = ("float16", "bfloat16", "float32")
OFFSETS = (*FLOATS, "int8", "int32")

Activations = Literal["static", "dynamic", "mixed"]
Granularity = Literal["channel", "tensor"]
Calibrated = Literal["pre-rope", "post-rope"]
Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")
KVName = tuple[int, Side, Literal["scale", "offset"]]


@dataclass(frozen=True)
class LinearQuant:
    """The stored tensors of a W8A8 linear, by name; None where there is no such tensor.

    Static: y = (x8 @ weight.T + quant_bias) * deq_scale, where x8 = clamp(round(x / input_scale +
    input_offset), -128, 127) and `bias`, the float linear's, is already inside `quant_bias`.
    Dynamic: y = (x8 @ weight.T) * weight_scale * s + bias, where each token has the scale s =
    max|x| / 127 and x8 = round(x / s). A mixed linear is stored for both.
    """

    activations: Activations
    weight: str  # int8 [out, in]
    weight_scale: str | None  # float [out, 1]
    weight_offset: str | None  # float [out, 1], zeros
    input_scale: str | None  # float [1]
    input_offset: str | None  # float [1]
    quant_bias: str | None  # int32 [out]
    deq_scale: str | None  # float32 [out], or int64 [out] holding a float32's bits
    bias: str | None  # float [out]

    @property
    def tensors(self) -> Mapping[str, str]:
        """The tensors that there are: part to name."""
        parts = {part: name for part, name in vars(self).items() if part != "activations"}
        return {part: name for part, name in parts.items() if name is not None}


@dataclass(frozen=True)
class KVScale:
    """Scale and offset of the K or V of one layer: q = clamp(round(x / scale + offset)).

    By channel they are [kv_heads * head_dim]; by tensor they hold one number.
    """

    scale: str
    offset: str | None
    granularity: Granularity


@dataclass(frozen=True)
class Quantization:
    """What a layout says about the tensors; the fields are those of Checkpoint."""

    layout: str
    w8a8: Mapping[str, LinearQuant] = field(default_factory=dict)
    kv: Mapping[int, tuple[KVScale, KVScale]] = field(default_factory=dict)
    kv_calibrated: Calibrated | None = None
    kvc8: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[ModelWarning, ...] = ()


# What older models call these in config.json, as the attribute maps of transformers have it.
ALSO: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
        "num_attention_heads": ("n_head", "n_heads", "num_heads"),
        "hidden_size": ("n_embd", "d_model"),
        "max_position_embeddings": ("n_positions", "n_ctx"),
    }
)


def fact(config: Mapping[str, object], name: str) -> object:
    """What a config says under a name or what older models call it; None where it says nothing."""
    names = (name, *ALSO.get(name, ()))
    return next((config[n] for n in names if config.get(n) is not None), None)


def layer_count(config: Mapping[str, object], where: str) -> int:
    """How many layers a config says, or ModelError at `where`."""
    return _positive(config, "num_hidden_layers", where)


def _positive(config: Mapping[str, object], name: str, where: str) -> int:
    return positive({name: fact(config, name)}, name, where)


def kv_widths(config: Mapping[str, object], where: str) -> tuple[int, ...]:
    """Work out kv_heads * head_dim of every layer from a config.json that is at `where`.

    `num_key_value_heads` defaults to `num_attention_heads`, and may be a list with a number for
    each layer; `head_dim` defaults to hidden_size // num_attention_heads. Older names count (ALSO).
    A `text_config` inside the config is the one that counts. Raises ModelError where a number is
    missing or absurd.
    """
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    layers, heads = layer_count(config, where), _kv_heads(config)
    each = heads if isinstance(heads, list) else [heads] * layers
    if len(each) != layers:
        raise ModelError(
            where,
            f"num_key_value_heads has {len(each)} numbers for {layers} layers",
            "correct it from the model's original config.json",
        )
    head_dim = _head_dim(config, where)
    return tuple(
        positive({"num_key_value_heads": n}, "num_key_value_heads", where) * head_dim for n in each
    )


def _kv_heads(config: Mapping[str, object]) -> object:
    """The KV heads that a config says or implies: a number, or one for each layer."""
    heads = config.get("num_key_value_heads")
    if heads is None and config.get("multi_query") is True:  # of GPT-BigCode: all share one
        return 1
    return fact(config, "num_attention_heads") if heads is None else heads


def _head_dim(config: Mapping[str, object], where: str) -> int:
    if config.get("head_dim") is not None:
        return positive(config, "head_dim", where)
    heads = _positive(config, "num_attention_heads", where)
    return _positive(config, "hidden_size", where) // heads


def layer_index(parts: Iterable[str]) -> int | None:
    """Find the layer in a tensor's dotted name: its first part that is a number, if any."""
    numbers = (part for part in parts if part.isascii() and part.isdecimal() and len(part) <= 6)
    first = next(numbers, None)
    return None if first is None else int(first)


def kv_scales(
    names: Mapping[KVName, str],
    tensors: Mapping[str, StoredTensor],
    widths: tuple[int, ...],
    granularity: Granularity,
    where: str,
) -> dict[int, tuple[KVScale, KVScale]]:
    """Pair up KV scales and offsets by layer and check them.

    Raises ModelError, at `where`, for a layer without a scale and a scale of a layer that is not
    there; at its file, for a tensor of the wrong shape or dtype.
    """
    if beyond := sorted(name for key, name in names.items() if key[0] >= len(widths)):
        raise ModelError(
            where,
            f"has {listed(beyond)} and config.json says {len(widths)} layers",
            "correct num_hidden_layers there",
        )
    tail = "{}_proj.kv_cache_scale" if granularity == "channel" else "{}_scale"
    for layer in range(len(widths)):
        for side in SIDES:
            if (layer, side, "scale") not in names:
                raise ModelError(
                    where,
                    f"layer {layer} has no {tail.format(side)}",
                    "calibrate the KV cache of every layer",
                )
    for key, name in names.items():
        check_dtype(tensors[name], FLOATS if key[2] == "scale" else OFFSETS)
        shapes = ((widths[key[0]],),) if granularity == "channel" else ((1,), ())
        check_shape(tensors[name], shapes, "config.json")

    def stored(layer: int, side: Side) -> KVScale:
        offset = names.get((layer, side, "offset"))
        return KVScale(names[layer, side, "scale"], offset, granularity)

    return {layer: (stored(layer, "k"), stored(layer, "v")) for layer in range(len(widths))}


def check_dtype(tensor: StoredTensor, kinds: tuple[str, ...]) -> None:
    """Raise ModelError unless the dtype of `tensor` is one of `kinds`."""
    if tensor.kind not in kinds:
        raise ModelError(
            place(tensor.file),
            f"{shown(tensor.name)} is {tensor.kind} and should be {' or '.join(kinds)}",
            "quantize the model again",
        )


def check_shape(tensor: StoredTensor, shapes: tuple[tuple[int, ...], ...], reason: str) -> None:
    """Raise ModelError unless `tensor` has one of `shapes`; `reason` says what asks for them."""
    if tensor.shape not in shapes:
        wanted = f"{reason} asks for {list(shapes[0])}"
        what = f"{shown(tensor.name)} has shape {list(tensor.shape)} and {wanted}"
        raise ModelError(place(tensor.file), what, "check that both belong to the same model")


def without_labels(tensors: Iterable[StoredTensor], where: str) -> list[ModelWarning]:
    """Account for tensors that nothing describes: floats pass, others give a warning.

    Raises ModelError for a weight that is not floating point, as its meaning is not known.
    """
    odd = [tensor for tensor in tensors if tensor.kind not in FLOATS]
    if weights := [tensor.name for tensor in odd if tensor.name.endswith("weight")]:
        raise ModelError(
            where,
            f"holds {listed(weights)}, which is not floating point and which nothing describes",
            "copy quant_model_description.json too, or take the float model",
        )
    what = f"holds {listed([tensor.name for tensor in odd])}, which is not floating point"
    return [ModelWarning(where, what, "kvc8 takes it for a buffer")] if odd else []
