"""What each parameter of a captured model is made of, given a checkpoint.

A float tensor is stored as it is; a linear that the checkpoint holds as W8A8 gets the expression
`w8a8(...)`, which gives the float weight and names the five tensors it came from, for
insert_linear_quant to find; `w8a8_dynamic(...)` and `w8a8_mix(...)` likewise. KV scales stand in
the expression of the cache they belong to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvc8.ir.capture.names import Names
from kvc8.ir.checkpoint.reader import Checkpoint, KVScale
from kvc8.ir.checkpoint.w8a8 import whole
from kvc8.ir.errors import ModelError, ModelWarning
from kvc8.ir.expression import Expression, cast, stacked, stored, values


def parameter_expression(
    checkpoint: Checkpoint,
    known: Names,
    names: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Expression:
    """The expression of a parameter of several names, the first of them its own (tied weights).

    `known` says under what names those are stored. Raises ModelError where no name is in the
    checkpoint, or the shapes differ.
    """
    for name in map(known.stored, names):
        module, _, part = name.rpartition(".")
        if module in checkpoint.w8a8 and part in ("weight", "bias"):
            return cast(linear_expression(checkpoint, module, part), dtype)
        if name in checkpoint.tensors:
            _check_shape(checkpoint, name, shape)
            same = checkpoint.tensors[name].dtype is dtype
            return stored(name) if same else cast(stored(name), dtype)
    if expression := _experts(checkpoint, known, names[0], shape, dtype):
        return expression
    what = f"has no tensor {names[0]}, which the model needs"
    do = "check that config.json belongs to these weights"
    raise ModelError(checkpoint.path.name, what, do)


def _experts(
    checkpoint: Checkpoint, known: Names, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Expression | None:
    """The weights of all experts [E, out, in], which transformers puts together from files.

    Checkpoints store each linear of each expert by itself.
    """
    patterns = known.experts(name)
    if len(shape) != 3 or not patterns or patterns[0].replace("*", "0") not in checkpoint.tensors:
        return None
    count, out, width = shape
    one = (out // len(patterns), width)
    for pattern in patterns:
        for expert in range(count):
            _check_shape(checkpoint, pattern.replace("*", str(expert)), one)
    modules = [p.removesuffix(".weight") for p in patterns]
    each = [m.replace("*", str(i)) for m in modules for i in range(count)]
    linears = [checkpoint.w8a8[module] for module in each if module in checkpoint.w8a8]
    weight = _joined(patterns, count)
    if not linears:
        same = {checkpoint.tensors[f"{m}.weight"].dtype for m in each} == {dtype}
        return weight if same else cast(weight, dtype)
    if len(linears) == len(each) and all(linear.weight_scale for linear in linears):
        scale = _joined([f"{module}.weight_scale" for module in modules], count)
        return cast(Expression("w8a8_dynamic", (weight, scale)), dtype)
    what = f"of the experts of {name} some are not W8A8 with weight_scale"
    raise ModelError(checkpoint.path.name, what, "quantize all of them, or none")


def _joined(patterns: Sequence[str], count: int) -> Expression:
    """The tensors of all experts, those of several linears one after the other."""
    parts = tuple(stacked(pattern, count) for pattern in patterns)
    return parts[0] if len(parts) == 1 else Expression("concat", (parts, 1))


def linear_expression(checkpoint: Checkpoint, module: str, part: str) -> Expression:
    """The weight or the bias of a linear in W8A8, as the float that it stands for."""
    linear = checkpoint.w8a8[module]
    if part == "bias" and linear.bias is not None:
        return stored(linear.bias)
    if linear.activations == "dynamic":
        if part == "bias" or linear.weight_scale is None:
            what = f"has no tensor {module}.{part}, which the model needs"
            raise ModelError(checkpoint.path.name, what, "quantize the model again")
        return Expression("w8a8_dynamic", (stored(linear.weight), stored(linear.weight_scale)))
    static = _static(checkpoint, module)
    if linear.activations == "mixed" and part == "weight" and linear.weight_scale is not None:
        first, *rest = static
        return Expression("w8a8_mix", (first, stored(linear.weight_scale), *rest))
    return Expression("w8a8" if part == "weight" else "w8a8_bias", static)


def _static(checkpoint: Checkpoint, module: str) -> tuple[Expression, ...]:
    """Weight, input scale and offset, deq_scale and quant_bias."""
    linear = checkpoint.w8a8[module]
    assert linear.deq_scale is not None
    assert linear.quant_bias is not None
    deq_scale = stored(linear.deq_scale)
    if checkpoint.tensors[linear.deq_scale].dtype is torch.int64:
        deq_scale = Expression("float_bits", (deq_scale,))
    parts = (linear.weight, *checkpoint.inputs[module])
    return (*map(stored, parts), deq_scale, stored(linear.quant_bias))


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if name not in checkpoint.tensors:
        what = f"has no tensor {name}, which the model needs"
        do = "check that config.json belongs to these weights"
        raise ModelError(checkpoint.path.name, what, do)
    found = checkpoint.tensors[name].shape
    if found != shape:
        what = f"{name} is {list(found)} and config.json wants {list(shape)}"
        raise ModelError(checkpoint.tensors[name].file.name, what, "check that they belong")


def constant_expression(tensor: Tensor) -> Expression:
    """A small constant of the model's code, written out."""
    flat = values(tensor.reshape(-1))
    return flat if tensor.dim() == 1 else Expression("reshape", (flat, tuple(tensor.shape)))


def cache_expressions(
    checkpoint: Checkpoint, layer: int, heads: int, k_dim: int, v_dim: int
) -> tuple[Expression, Expression]:
    """The caches of a layer, K and V, with what the checkpoint says of their scales."""
    if layer not in checkpoint.kv:
        return Expression("cache"), Expression("cache")
    k, v = checkpoint.kv[layer]
    calibrated = checkpoint.kv_calibrated
    return (
        Expression("cache", (*_scale(checkpoint, k, heads, k_dim), calibrated)),
        Expression("cache", (*_scale(checkpoint, v, heads, v_dim), None)),
    )


def _scale(
    checkpoint: Checkpoint, kv: KVScale, heads: int, dim: int
) -> tuple[Expression, Expression | None]:
    """Scale and zero point, float32 [heads, dim]; no zero point where all are 0 (symmetric)."""

    def spread(name: str) -> Expression:
        x = cast(stored(name), torch.float32)
        if kv.granularity == "channel":
            return Expression("reshape", (x, (heads, dim)))
        return Expression("expand", (Expression("reshape", (x, (1, 1))), (heads, dim)))

    symmetric = kv.offset is None or not bool(checkpoint.read(kv.offset).any())
    return spread(kv.scale), None if symmetric or kv.offset is None else spread(kv.offset)


def check_kv_scales(checkpoint: Checkpoint) -> list[ModelWarning]:
    """Raise ModelError at a scale or offset that quantizes nothing; gives warnings.

    Shards whose scales are zero everywhere hold headers without data. They compile, for what a
    model costs can be asked before its weights are there; they are refused when run.
    """
    sides = [side for pair in checkpoint.kv.values() for side in pair]
    for side in sides:
        if side.offset is not None and not whole(checkpoint.read(side.offset)):
            what = "has an offset that is not a whole number from -256 to 256"
            again = "quantize the KV cache again"
            raise ModelError(checkpoint.path.name, f"{side.offset} {what}", again)
    bad = [side.scale for side in sides if not _sound(checkpoint, side)]
    if not bad:
        return []
    names = [side.scale for side in sides]
    if bad == names and not any(bool(checkpoint.read(name).any()) for name in names):
        what = "every kv_cache_scale is zero, so the shards hold no data"
        do = "the result has the right shape and will not run"
        return [ModelWarning(checkpoint.path.name, what, do)]
    what = "has a scale that is zero, negative, infinite or not a number"
    raise ModelError(checkpoint.path.name, f"{bad[0]} {what}", "quantize the KV cache again")


def _sound(checkpoint: Checkpoint, kv: KVScale) -> bool:
    scale = checkpoint.read(kv.scale).float()
    return bool((scale.isfinite() & (scale > 0)).all())
