"""Read the int8 KV cache of a compressed-tensors checkpoint: `kv_cache_scheme` in config.json.

Each attention holds `k_scale` and `v_scale`, and `k_zero_point` and `v_zero_point` where the scheme
is not symmetric, one number each, observed where the cache is written, so K after RoPE. Linears
must be float: its W8A8 quantizes activations token by token, and kvc8's linears are static.
"""

from collections.abc import Mapping

from kvc8.ir.checkpoint.layouts import (
    KVName,
    Quantization,
    kv_scales,
    kv_widths,
    layer_index,
    without_labels,
)
from kvc8.ir.checkpoint.model_files import listed, shown
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import ModelError, ModelWarning

STATIC_INT8: Mapping[str, object] = {
    "num_bits": 8,
    "type": "int",
    "strategy": "tensor",
    "dynamic": False,
}


def read_compressed_tensors(
    scheme_of: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, object],
    where: str,
) -> Quantization:
    """Work out what `quantization_config` (`scheme_of`) in the config.json at `where` says.

    Raises ModelError for a scheme other than static int8 by tensor, quantized linears, and scales
    that are missing or of a wrong shape or dtype.
    """
    if scheme_of.get("config_groups"):
        raise ModelError(
            where,
            "config_groups quantizes linears in a way that kvc8 does not read",
            "take the float model and quantize it with kvc8-quantize",
        )
    scheme = scheme_of.get("kv_cache_scheme")
    fields = scheme if isinstance(scheme, dict) else {}
    for name, value in STATIC_INT8.items():
        if fields.get(name) != value:
            raise ModelError(
                where,
                f"kv_cache_scheme has {name} {shown(fields.get(name))} and kvc8 reads {value}",
                "calibrate a static int8 KV cache",
            )
    names = {key: name for name in tensors if (key := kv_name(name))}
    kv = kv_scales(names, tensors, kv_widths(config, where), "tensor", where)
    return Quantization(
        "compressed-tensors",
        kv=kv,
        kv_calibrated="post-rope",
        warnings=_rest(tensors, set(names.values()), where),
    )


def _rest(
    tensors: Mapping[str, StoredTensor], known: set[str], where: str
) -> tuple[ModelWarning, ...]:
    """Account for the tensors that are not KV scales."""
    rest = {name: tensor for name, tensor in tensors.items() if name not in known}
    warnings = without_labels(rest.values(), where)
    if scales := [name for name in rest if name.endswith(("_scale", "_zero_point"))]:
        what = "which belongs to no scheme that kvc8 reads"
        warnings.append(
            ModelWarning(where, f"the model holds {listed(scales)}, {what}", "check what wrote it")
        )
    return tuple(warnings)


def kv_name(name: str) -> KVName | None:
    """Read `<...>.<layer>.<...>.k_scale` and its like."""
    *path, part = name.split(".")
    layer = layer_index(path)
    if layer is None:
        return None
    match part:
        case "k_scale":
            return layer, "k", "scale"
        case "v_scale":
            return layer, "v", "scale"
        case "k_zero_point":
            return layer, "k", "offset"
        case "v_zero_point":
            return layer, "v", "offset"
    return None
