"""What each parameter of a captured model is made of, given a checkpoint.

A float tensor is stored as it is; a linear that the checkpoint holds as W8A8 gets the expression
`w8a8(...)`, which gives the float weight and names the five tensors it came from, for
insert_linear_quant to find. KV scales stand in the expression of the cache they belong to.
"""

import torch
from torch import Tensor

from kvc8.ir.checkpoint.reader import Checkpoint, KVScale
from kvc8.ir.errors import ModelError, ModelWarning
from kvc8.ir.expression import Expression, cast, stored, values
from kvc8.ir.kv_params import whole


def parameter_expression(
    checkpoint: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> Expression:
    """The expression of a parameter of several names, the first of them its own (tied weights).

    Raises ModelError where no name is in the checkpoint, or the shapes differ.
    """
    for name in names:
        module, _, part = name.rpartition(".")
        if module in checkpoint.w8a8 and part in ("weight", "bias"):
            return cast(_w8a8(checkpoint, module, part), dtype)
        if name in checkpoint.tensors:
            _check_shape(checkpoint, name, shape)
            same = checkpoint.tensors[name].dtype is dtype
            return stored(name) if same else cast(stored(name), dtype)
    if expression := _experts(checkpoint, names[0], shape, dtype):
        return expression
    what = f"has no tensor {names[0]}, which the model needs"
    do = "check that config.json belongs to these weights"
    raise ModelError(checkpoint.path.name, what, do)


EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _experts(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Expression | None:
    """The weights of all experts [E, out, in], which transformers puts together from files.

    Checkpoints store each linear of each expert by itself.
    """
    path, _, part = name.rpartition(".")
    linears = EXPERTS.get(part, ())
    first = f"{path}.0.{linears[0]}.weight" if linears else ""
    if first not in checkpoint.tensors or len(shape) != 3:
        return None
    count, out, width = shape
    one = (out // len(linears), width)
    made: list[Expression] = []
    for expert in range(count):
        modules = [f"{path}.{expert}.{linear}.weight" for linear in linears]
        parts = tuple(parameter_expression(checkpoint, (n,), one, dtype) for n in modules)
        whole = parts[0] if len(parts) == 1 else Expression("concat", (parts, 0))
        made.append(Expression("reshape", (whole, (1, out, width))))
    return Expression("concat", (tuple(made), 0))


def _w8a8(checkpoint: Checkpoint, module: str, part: str) -> Expression:
    linear = checkpoint.w8a8[module]
    if part == "bias" and linear.bias is not None:
        return stored(linear.bias)
    deq_scale = stored(linear.deq_scale)
    if checkpoint.tensors[linear.deq_scale].dtype is torch.int64:
        deq_scale = Expression("float_bits", (deq_scale,))
    parts = (linear.weight, *checkpoint.inputs[module])
    op = "w8a8" if part == "weight" else "w8a8_bias"
    return Expression(op, (*map(stored, parts), deq_scale, stored(linear.quant_bias)))


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
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
