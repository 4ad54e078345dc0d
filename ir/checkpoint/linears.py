"""The W8A8 linears of a description: which tensors a label stands for, and what they must be.

    W8A8           weight, input_scale, input_offset, quant_bias, deq_scale: one for all tokens
    W8A8_DYNAMIC   weight, weight_scale: a scale for each token, found at run time
    W8A8_MIX       all of both. vllm-ascend takes the tokens of a prompt dynamically, and decodes
                   statically on a node that does nothing else; kvc8 takes both dynamically.

(msModelSlim docs/zh/user_guide/quantization_formats/ascendv1.md and ascendv1.py; vllm-ascend
quantization/methods/w8a8_pdmix.py.) weight_offset holds zeros, and bias is the float linear's.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvc8.ir.checkpoint.layouts import (
    FLOATS,
    OFFSETS,
    Activations,
    LinearQuant,
    check_dtype,
    check_shape,
)
from kvc8.ir.checkpoint.model_files import listed, place, shown
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import ModelError

DTYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "weight": ("int8",),
        "weight_scale": FLOATS,
        "weight_offset": OFFSETS,
        "input_scale": FLOATS,
        "input_offset": OFFSETS,
        "quant_bias": ("int32",),
        "deq_scale": ("int64", "float32"),
        "bias": FLOATS,
    }
)
STATIC = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
DYNAMIC = ("weight", "weight_scale")
OPTIONAL = ("weight_scale", "weight_offset", "bias")
REQUIRED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"W8A8": STATIC, "W8A8_DYNAMIC": DYNAMIC, "W8A8_MIX": (*STATIC, "weight_scale")}
)
LINEAR_LABELS = tuple(REQUIRED)
ACTIVATIONS: Mapping[str, Activations] = MappingProxyType(
    {"W8A8": "static", "W8A8_DYNAMIC": "dynamic", "W8A8_MIX": "mixed"}
)
Parts = dict[str, tuple[str, str]]  # of a linear: part to the tensor's name and label


def has_part(label: str, part: str) -> bool:
    """Whether a linear of that label has such a tensor."""
    return label in REQUIRED and part in (*REQUIRED[label], *OPTIONAL)


def read_linear(
    where: str, prefix: str, parts: Parts, tensors: Mapping[str, StoredTensor]
) -> LinearQuant:
    """Check the tensors of a W8A8 linear and put their names together.

    Raises ModelError for tensors of several labels, a missing one, a wrong dtype or shape.
    """
    labels = list(dict.fromkeys(label for _, label in parts.values()))
    if len(labels) > 1:
        what = f"labels tensors of {shown(prefix)} {listed(labels)}"
        raise ModelError(where, what, "quantize the model again")
    if missing := [part for part in REQUIRED[labels[0]] if part not in parts]:
        what = f"{shown(prefix)} is {labels[0]} and has no {listed(missing)}"
        raise ModelError(where, what, "quantize the model again")
    names: dict[str, str | None] = {
        part: parts[part][0] if part in parts else None for part in DTYPES
    }
    bias = names["bias"] or f"{prefix}.bias"
    names["bias"] = bias if bias in tensors else None
    linear = LinearQuant(activations=ACTIVATIONS[labels[0]], **names)  # type: ignore[arg-type]
    _check(linear, tensors)
    return linear


def _check(linear: LinearQuant, tensors: Mapping[str, StoredTensor]) -> None:
    """Check dtypes and shapes of the tensors of a W8A8 linear, all by its weight's."""
    stored = {part: tensors[name] for part, name in linear.tensors.items()}
    weight = stored["weight"]
    for part, tensor in stored.items():
        check_dtype(tensor, DTYPES[part])
    if len(weight.shape) != 2:
        wanted = "a linear's weight has two dimensions"
        what = f"{shown(weight.name)} has shape {list(weight.shape)} and {wanted}"
        raise ModelError(place(weight.file), what, "quantize the model again")
    rows = weight.shape[0]
    for part, tensor in stored.items():
        shapes: tuple[tuple[int, ...], ...] = ((rows,),)
        if part.startswith("weight"):
            shapes = (weight.shape,) if part == "weight" else ((rows, 1), (rows,))
        elif part.startswith("input"):
            shapes = ((1,), ())
        check_shape(tensor, shapes, f"its weight {list(weight.shape)}")
