"""Read the description that msModelSlim writes beside the weights it quantizes.

The description is one JSON object: a label for every stored tensor (FLOAT, W8A8, C8) among a few
settings. W8A8_DYNAMIC and W8A8_MIX are W8A8 with a scale a token, and stored for both ways
(ir/checkpoint/linears.py). Three layouts share it:

    safe_tensor      quant_model_description_w8a8.json; norms are stored twice, also as `.module.`
    ascendV1         quant_model_description.json, quant_model_weight_w8a8*.safetensors
    msmodelslim-v1   quant_model_description.json with `metadata` and `optional`, written by the
                     newer command line; no weight_scale or weight_offset

The first two observe K before RoPE, the third after it; `"kvc8": {"kv_calibrated": ...}`, which
kvc8-quantize adds, overrules that. Every label must have its tensor, but for the lm_head that a
model ties to its embedding, and a tensor without a label is reported. A label or setting with a
meaning that kvc8 does not implement is an error.
"""

from collections.abc import Mapping
from pathlib import Path

from kvc8.ir.checkpoint.layouts import (
    FLOATS,
    Calibrated,
    KVName,
    KVScale,
    Quantization,
    check_dtype,
    kv_scales,
    kv_widths,
    layer_index,
)
from kvc8.ir.checkpoint.linears import LINEAR_LABELS, Parts, has_part, read_linear
from kvc8.ir.checkpoint.model_files import listed, place, shown
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import ModelError, ModelWarning

NAME, OLD_NAME = "quant_model_description.json", "quant_model_description_"  # ..._w8a8.json
LABELS = ("FLOAT", *LINEAR_LABELS, "C8")
SETTINGS: Mapping[str, tuple[object, ...]] = {  # the values that mean what kvc8 implements
    "version": ("1.0.0",),
    "model_quant_type": (*LINEAR_LABELS, "FLOAT"),
    "kv_cache_type": ("C8", None),
    "kv_quant_type": ("C8", None),
    "fa_quant_type": (None, ""),
    "reduce_quant_type": (None, ""),
    "group_size": (0, -1, None),
    "metadata": ({},),
    "optional": ({},),
}
HARMLESS = ("version", "metadata", "optional")  # other values of these are only reported
NEWER_WEIGHTS = "quant_model_weights"
UNSUPPORTED = (
    "the vendor does not support C8 without W8A8",
    "add W8A8 with kvc8-quantize to run this on the vendor's own stack",
)
SWITCHED_OFF = (
    "holds KV scales and neither it nor config.json says C8",
    "add kv_quant_type C8 for the vendor's own stack to use them",
)


def read_description(
    path: Path,
    description: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, object],
) -> Quantization:
    """Work out what the description at `path` says about `tensors`.

    Raises ModelError for a label without its tensor or with a meaning that kvc8 does not know, a
    W8A8 linear or a layer's KV scale that is not whole, and wrong shapes and dtypes.
    """
    where = place(path)
    switched = _switched_on(path, description, config)
    labels, warnings = _labels(where, description, tensors, config)
    kv_names, linears = _sort_out(where, labels, tensors)
    kv: Mapping[int, tuple[KVScale, KVScale]] = {}
    if kv_names or switched:
        widths = kv_widths(config, place(path.parent, "config.json"))
        kv = kv_scales(kv_names, tensors, widths, "channel", where)
    w8a8 = {prefix: read_linear(where, prefix, linears[prefix], tensors) for prefix in linears}
    if kv and not w8a8:
        warnings.append(ModelWarning(where, *UNSUPPORTED))
    if kv and not switched:
        warnings.append(ModelWarning(where, *SWITCHED_OFF))
    kvc8 = description.get("kvc8", {})
    if not isinstance(kvc8, dict):
        raise ModelError(where, f"kvc8 is {shown(kvc8)}", "it should be an object")
    layout = layout_of(path, description, tensors)
    calibrated = calibrated_of(where, layout, kvc8) if kv else None
    return Quantization(layout, w8a8, kv, calibrated, kvc8, tuple(warnings))


def _switched_on(
    path: Path, description: Mapping[str, object], config: Mapping[str, object]
) -> bool:
    """Check the settings in config.json; whether they or the description's turn C8 on."""
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    for name, value in settings.items():
        if name in SETTINGS and name not in HARMLESS:
            _setting(place(path.parent, "config.json"), name, value)
    kinds = (description.get("kv_cache_type"), description.get("kv_quant_type"))
    return "C8" in (*kinds, settings.get("kv_quant_type"))


def layout_of(
    path: Path, description: Mapping[str, object], tensors: Mapping[str, StoredTensor]
) -> str:
    """Tell which of the three layouts the description at `path` and its weights are."""
    if path.name != NAME:
        return "safe_tensor"
    newer = any(tensor.file.name.startswith(NEWER_WEIGHTS) for tensor in tensors.values())
    return "msmodelslim-v1" if newer or {"metadata", "optional"} & set(description) else "ascendV1"


def calibrated_of(where: str, layout: str, kvc8: Mapping[str, object]) -> Calibrated:
    """Tell where K was measured: what kvc8-quantize noted, else what the layout's tool does."""
    if "kv_calibrated" not in kvc8:
        return "post-rope" if layout == "msmodelslim-v1" else "pre-rope"
    match kvc8["kv_calibrated"]:
        case "pre-rope":
            return "pre-rope"
        case "post-rope":
            return "post-rope"
        case other:
            raise ModelError(
                where, f"kv_calibrated is {shown(other)}", "it should be pre-rope or post-rope"
            )


def _labels(
    where: str,
    description: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, object],
) -> tuple[dict[str, str], list[ModelWarning]]:
    """Tell labels from settings and check both; gives the labels, and warnings."""
    labels: dict[str, str] = {}
    strange: list[str] = []
    for name, value in description.items():
        if name in SETTINGS:
            strange += _setting(where, name, value)
        elif value == "FLOAT" and name not in tensors and tied_head(name, config):
            continue  # the embedding, which has a label of its own
        elif isinstance(value, str) and (value in LABELS or name in tensors):
            labels[name] = _label(where, name, value, tensors)
        elif name != "kvc8":
            strange.append(name)
    warnings = list[ModelWarning]()
    if strange:
        what = f"says {listed(strange)}, which kvc8 does not know and leaves out"
        warnings.append(ModelWarning(where, what, "check what wrote it"))
    warnings += _unlabeled(where, labels, tensors)
    return labels, warnings


def _unlabeled(
    where: str, labels: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> list[ModelWarning]:
    """Report the tensors that have no label; raises ModelError for one that is not float."""
    bare = [name for name in tensors if name not in labels]
    if odd := [name for name in bare if tensors[name].kind not in FLOATS]:
        raise ModelError(
            where,
            f"has no label for {listed(odd)}, which is not floating point",
            "copy the description that belongs to these weights",
        )
    what, do = f"has no label for {listed(bare)}", "kvc8 takes it as FLOAT, check that it is"
    return [ModelWarning(where, what, do)] if bare else []


def tied_head(name: str, config: Mapping[str, object]) -> bool:
    """Whether `name` is an output layer that config.json says is the embedding.

    Tools label every module, and safetensors stores what two of them share once.
    """
    text = config.get("text_config")
    tied = config.get(
        "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None
    )
    return tied is True and name.rpartition("lm_head.")[1:] == ("lm_head.", "weight")


def _setting(where: str, name: str, value: object) -> list[str]:
    """Check a setting; gives its name where it should be reported."""
    if value in SETTINGS[name] and not isinstance(value, bool):
        return []
    if name == "optional" and isinstance(value, dict) and set(value) == {"quarot"}:
        return []  # where a rotation lies that is in the weights already
    if name == "metadata" and isinstance(value, dict) and "quarot" in value:
        what = "says that values are rotated at run time, which kvc8 does not do"
        raise ModelError(where, what, "quantize the model with offline rotations only")
    if name in HARMLESS:
        return [name]
    raise ModelError(
        where,
        f"{name} is {shown(value)}, which kvc8 does not read",
        "quantize the model to W8A8 with C8, per channel",
    )


def _label(where: str, name: str, value: str, tensors: Mapping[str, StoredTensor]) -> str:
    """Check one label and that its tensor is stored."""
    if value not in LABELS:
        raise ModelError(
            where,
            f"labels {shown(name)} {shown(value)}, which kvc8 does not read",
            "quantize the model to W8A8 with C8",
        )
    if name not in tensors:
        raise ModelError(
            where,
            f"labels {shown(name)} {value} and no weights file holds it",
            "copy the directory again",
        )
    return value


def _sort_out(
    where: str, labels: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[KVName, str], dict[str, Parts]]:
    """Give each labeled tensor its place: a KV scale, part of a W8A8 linear, or plain float."""
    kv: dict[KVName, str] = {}
    linears: dict[str, Parts] = {}
    for name, label in labels.items():
        prefix, _, part = name.rpartition(".")
        if (key := kv_name(name)) and label != "FLOAT":
            if key in kv:
                raise ModelError(
                    where, f"labels both {shown(kv[key])} and {shown(name)}", "remove one of them"
                )
            kv[key] = name
        elif label == "FLOAT" and not key:
            check_dtype(tensors[name], FLOATS)
        elif has_part(label, part) and not _norm_copy(name, tensors, labels):
            linears.setdefault(prefix, {})[part] = name, label
        elif not _norm_copy(name, tensors, labels):
            raise ModelError(
                where,
                f"labels {shown(name)} {label}, which such a tensor cannot be",
                "quantize the model again",
            )
    return kv, linears


def kv_name(name: str) -> KVName | None:
    """Read `<...>.<layer>.<...>.k_proj.kv_cache_scale` and its like, also below a fused linear."""
    *path, module, part = ["", "", *name.split(".")]
    layer = layer_index(path)
    if layer is None:
        return None
    match module, part:
        case "k_proj", "kv_cache_scale":
            return layer, "k", "scale"
        case "k_proj", "kv_cache_offset":
            return layer, "k", "offset"
        case "v_proj", "kv_cache_scale":
            return layer, "v", "scale"
        case "v_proj", "kv_cache_offset":
            return layer, "v", "offset"
    return None


def _norm_copy(name: str, tensors: Mapping[str, StoredTensor], labels: Mapping[str, str]) -> bool:
    """Whether `name` is safe_tensor's second copy of a norm: `<norm>.module.weight` or `.bias`."""
    first = name.replace(".module.", ".")
    if first == name or labels.get(first) != "FLOAT":
        return False
    copy, norm = tensors[name], tensors[first]
    return (copy.dtype, copy.shape) == (norm.dtype, norm.shape)
