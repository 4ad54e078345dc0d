"""The arithmetic of W8A8 and C8: from ranges and float weights to the numbers a checkpoint stores.

The formulas are msModelSlim's (`linear_quantization_params` and `complex_quantifier.py`, measured
on its output), with two changes. They are computed in float32, where msModelSlim divides in the
model's own dtype and so rounds twice; and a scale is rounded up, not to nearest, when it is stored,
so that the extreme it was made from never lies beyond the last code.

    device:  x8 = clamp(round(x / input_scale + input_offset), -128, 127)
             y  = (x8 · weight + quant_bias) * deq_scale
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir.expression import STEPS

# From a weight [out, in] and its scale [out, 1], both float32, to int8 codes in -127..127.
Rounding = Callable[[Tensor, Tensor], Tensor]
EPS = 1.1920929e-07  # msModelSlim's least scale: float32's epsilon
FURTHEST_OFFSET = 256  # of a cache; bfloat16 holds whole numbers up to it
# Half of what an int32 holds is left to x8·weight, and a quarter to the offset's share.
LARGEST_BIAS = 2.0**29


@dataclass(frozen=True)
class Range:
    """The least and the greatest value seen."""

    low: float
    high: float


def stored_scale(scale: Tensor, dtype: torch.dtype, least: float) -> Tensor:
    """A float32 scale as it is stored in `dtype`: at least as large, and at least `least`."""
    return STEPS["round_up"](scale.clamp(min=least), dtype).to(dtype)


def least_scale(dtype: torch.dtype) -> float:
    """The least scale of what is quantized at run time, where nothing but zeros was seen.

    msModelSlim's 1.19e-07 is subnormal in float16, where it has one significant bit and its
    reciprocal, by which NPU ops multiply, is infinite, so that 0 becomes no number. The least is
    therefore never below the smallest normal number of `dtype`.
    """
    return max(EPS, torch.finfo(dtype).smallest_normal)


def kv_scale(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The symmetric C8 scale of each channel: absmax / 127."""
    return stored_scale(absmax.float() / 127, dtype, least_scale(dtype))


def whole(offset: Tensor) -> bool:
    """Whether offsets are codes: whole numbers, not far outside of int8."""
    wide = offset.float()
    # No NaN passes this.
    return bool((wide == wide.round()).all() and wide.abs().max() <= FURTHEST_OFFSET)


def kv_params_with_offset(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The C8 scale and offset [C] whose codes -127..127 hold a range: (hi-lo)/254, round(-mid/s).

    A range far from zero gets a wider step, so that its offset stays from -256 to 256.
    """
    middle, half = (low.float() + high.float()) / 2, (high.float() - low.float()) / 2
    far = (middle.abs() + half) * (127 / (FURTHEST_OFFSET + 127))
    scale = kv_scale(half.maximum(far), dtype)
    offset = torch.round(-middle / scale.float()).clamp(-FURTHEST_OFFSET, FURTHEST_OFFSET)
    return scale, offset.to(dtype)


def input_params(seen: Range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The static scale and offset [1] of a linear's input: (hi-lo)/255, round(-lo/scale)-128.

    Zero is made part of the range, so that it has an exact code.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    scale = stored_scale(torch.tensor([(high - low) / 255]), dtype, least_scale(dtype))
    offset = torch.round(-low / scale.float()) - 128
    return scale, offset.to(dtype)


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """The codes nearest to weight / scale."""
    return torch.round(weight / scale).clamp(-127, 127).to(torch.int8)


def quantize_linear(
    weight: Tensor,
    bias: Tensor | None,
    seen: Range,
    dtype: torch.dtype,
    rounding: Rounding = nearest,
) -> Mapping[str, Tensor]:
    """The tensors of a W8A8 linear by their last name, stored for a model of `dtype`.

    The bias is inside of quant_bias; that msModelSlim stores it once more is left to the caller.

    weight [out, in] becomes int8, symmetric per output channel, scale max|w|/127, clamped to
    -127..127. deq_scale is float32(input_scale * weight_scale): as it is in a bfloat16 model, as
    its bits in an int64 in others. quant_bias is round(bias/deq_scale - sum(w8)*input_offset).
    """
    input_scale, input_offset = input_params(seen, dtype)
    scale = _weight_scale(weight.float(), bias, float(input_scale), dtype)
    w8 = rounding(weight.float(), scale.float())
    deq_scale = input_scale.float() * scale.float()[:, 0]
    shift = w8.sum(1, dtype=torch.int64) * input_offset.double()
    wanted = torch.zeros_like(shift) if bias is None else bias.double() / deq_scale.double()
    bits = deq_scale.view(torch.int32).to(torch.int64)
    return {
        "weight": w8,
        "weight_scale": scale,
        "weight_offset": torch.zeros_like(scale),
        "input_scale": input_scale,
        "input_offset": input_offset,
        "quant_bias": torch.round(wanted - shift).to(torch.int32),
        "deq_scale": deq_scale if dtype is torch.bfloat16 else bits,
    }


def quantize_dynamic(weight: Tensor, rounding: Rounding = nearest) -> Mapping[str, Tensor]:
    """The tensors of a W8A8_DYNAMIC linear by their last name: nothing of its input is stored.

    weight [out, in] becomes int8 as in `quantize_linear`; scales are float32, as the vendor's
    document has them (msModelSlim quantization_formats/ascendv1.md).
    """
    scale = _weight_scale(weight.float(), None, 1.0, torch.float32)
    w8 = rounding(weight.float(), scale)
    return {"weight": w8, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def _weight_scale(
    weight: Tensor, bias: Tensor | None, input_scale: float, dtype: torch.dtype
) -> Tensor:
    """The scale [out, 1] of each row, large enough too for its bias to fit into an int32."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    if bias is not None:
        scale = scale.maximum(bias.float().abs()[:, None] / (input_scale * LARGEST_BIAS))
    return stored_scale(scale, dtype, EPS)  # no device divides by it


def part_types(
    out: int, width: int, dtype: torch.dtype
) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of what `quantize_linear` gives."""
    deq_scale = torch.float32 if dtype is torch.bfloat16 else torch.int64
    return {
        "weight": (torch.int8, (out, width)),
        "weight_scale": (dtype, (out, 1)),
        "weight_offset": (dtype, (out, 1)),
        "input_scale": (dtype, (1,)),
        "input_offset": (dtype, (1,)),
        "quant_bias": (torch.int32, (out,)),
        "deq_scale": (deq_scale, (out,)),
    }


def dynamic_part_types(out: int, width: int) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of what `quantize_dynamic` gives."""
    column = (torch.float32, (out, 1))
    return {"weight": (torch.int8, (out, width)), "weight_scale": column, "weight_offset": column}


def finite(seen: Range) -> bool:
    """Whether both ends of a range are numbers."""
    return math.isfinite(seen.low) and math.isfinite(seen.high)
