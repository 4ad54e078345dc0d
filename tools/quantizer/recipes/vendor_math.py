"""msModelSlim's arithmetic, to the bit: what is rounded, in which dtype, in which order.

It computes scales and codes in the model's own dtype, so float16 rounds twice: the scale, and the
quotient. ir/checkpoint/w8a8.py has the same formulas without these roundings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir.checkpoint.w8a8 import EPS

ROWS = 1 << 16  # numbers of a weight worked on at a time: they stay in a core's cache


@dataclass(frozen=True)
class Params:
    """Scale and offset of a quantizer: q = clamp(round(x / scale + offset), -128, 127)."""

    scale: Tensor
    offset: Tensor


def params(low: Tensor, high: Tensor, symmetric: bool) -> Params:
    """`linear_quantization_params`: zero is made part of the range.

    The least scale is 1.19e-07 in any dtype; in float16 that is subnormal, and rounded. An
    asymmetric offset is not clamped, for zero is in the range.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    least = torch.tensor([EPS], dtype=low.dtype)
    if symmetric:
        scale = torch.maximum(torch.maximum(-low, high) / 127, least)
        return Params(scale, torch.zeros_like(scale))
    scale = torch.maximum((high - low) / 255, least)
    return Params(scale, torch.round(-low / scale) - 128)


def fake_quantize(x: Tensor, at: Params) -> Tensor:
    """X as a quantizer lets it through.

    A float16 x and the float32 scale of a histogram are divided in float32, because the scale is
    a tensor of one number and not of no dimensions; with the float16 scale of min and max, in
    float16.
    """
    codes = (x / at.scale).add_(at.offset).round_().clamp_(-128, 127)
    return codes.sub_(at.offset).mul_(at.scale).to(x.dtype)


def weight_scale(weight: Tensor) -> Tensor:
    """The symmetric scale [out, 1] of each row of a weight."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)  # 14x aminmax's speed
    return torch.maximum(low.neg_(), high).div_(127).clamp_(min=EPS)  # as params has it


def fake_quantized_weight(weight: Tensor, smooth: Tensor | None = None) -> Tensor:
    """A weight with rounded rows; with `smooth` s [in], Q(w * s) / s.

    Codes reach -128 here and only -127 in what is saved: msModelSlim calibrates with the wider
    clamp. A symmetric scale never gives -128, but for float16's rounding of it.
    """
    new = torch.empty_like(weight)
    step = max(ROWS // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        rows, out = weight[start : start + step], new[start : start + step]
        torch.mul(rows, smooth, out=out) if smooth is not None else out.copy_(rows)
        scale = weight_scale(out)
        out.div_(scale).round_().clamp_(-128, 127).mul_(scale)
        if smooth is not None:
            out.div_(smooth)
    return new


def linear_parts(weight: Tensor, bias: Tensor | None, at: Params) -> Mapping[str, Tensor]:
    """The tensors of a W8A8 linear as `complex_quantifier.py` saves them, by their last name.

    deq_scale is float32, but its product is taken in the scales' own dtype: in float16 where both
    are. It is stored as the bits of float32 in an int64, in a bfloat16 model as it is. The bias
    goes into quant_bias, and is stored once more as a float tensor by the caller.
    """
    scale = weight_scale(weight)
    w8 = (weight / scale).round_().clamp_(-127, 127).to(torch.int8)
    deq_scale = (at.scale * scale).squeeze(1).float()
    shift = w8.float().sum(1) * at.offset.float()
    wanted = torch.zeros(len(w8)) if bias is None else bias
    bits = deq_scale.view(torch.int32).to(torch.int64)
    return {
        "weight": w8,
        "weight_scale": scale,
        "weight_offset": torch.zeros_like(scale),
        "input_scale": at.scale,
        "input_offset": at.offset,
        "quant_bias": torch.round(wanted / deq_scale - shift).to(torch.int32),
        "deq_scale": deq_scale if weight.dtype is torch.bfloat16 else bits,
    }
