"""Quantize and dequantize, on a CPU, as the documents of the ops and their kernels have it.

Rounding is half to even and results saturate. Where half precision (float16, bfloat16) is named,
float32 is taken as well: an extension of kvc8 to cross-check numerics, not legal on a device.
"""

from typing import Any

import torch
from torch import Tensor

from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import codes_of, dtype_of

_HALF_OR_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


def refuse(op: str, others: dict[str, Any]) -> None:
    """Raise for the first argument of op that was given a value and is not emulated."""
    for name, value in others.items():
        if value is not None:
            raise TargetError(op, f"{name} is not emulated", "leave it out")


def require_float(op: str, name: str, x: Tensor) -> None:
    """Raise unless x is float16 or bfloat16 (or float32: kvc8's own extension)."""
    if x.dtype not in _HALF_OR_FLOAT:
        raise TargetError(op, f"{name} is {x.dtype}", "give float16 or bfloat16")


def saturate(value: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Round float values half to even and clamp them to what the integer dtype holds."""
    limits = torch.iinfo(dtype)
    if dtype == torch.int32:  # float32 cannot hold 2**31 - 1
        value = value.double()
    return value.round().clamp_(limits.min, limits.max).to(dtype).contiguous()


def along(parameter: Tensor, rank: int, axis: int) -> Tensor:
    """A per-tensor or per-channel parameter, float32, shaped to broadcast along one axis."""
    if parameter.ndim == 1 and rank and (parameter.numel() == 1 or axis == -1):
        return parameter.float()  # which broadcasts as it is
    if parameter.numel() == 1:
        return parameter.float().reshape(())
    if parameter.ndim != 1:
        return parameter.float()
    shape = [1] * rank
    shape[axis] = -1
    return parameter.float().reshape(shape)


def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """Per-tensor or per-channel quantization, float32 inside.

    div_mode: clamp(rint(input / scales + zero_points)), parameters along axis; input float16 or
    bfloat16, scales float32 or bfloat16, zero points integer or bfloat16 (aclnnQuantize). The
    kernel for A2 is closed: the formula is that of the ops-nn golden.
    Otherwise: clamp(rint(input * scales + zero_points)), where scales and zero points have the
    dtype of input and any axis but -2 means the last one (op-plugin QuantizeKernelNpuOpApi.cpp,
    aclnnAscendQuantV3; the kernel multiplies, adds and rounds in float32).
    Extension of kvc8: input, scales and zero points may be float32.
    """
    require_float("npu_quantize", "input", input)
    target = codes_of("npu_quantize", dtype)
    if not div_mode:
        axis = _multiplying_axis(input, scales, axis)
    elif scales.dtype not in (torch.float32, torch.bfloat16):
        raise TargetError(
            "npu_quantize", f"scales are {scales.dtype}", "divide by float32 or bfloat16"
        )
    scale = along(scales, input.ndim, axis)
    value = input.float() / scale if div_mode else input.float() * scale
    if zero_points is not None:
        value = value.add_(along(zero_points, input.ndim, axis))
    return saturate(value, target)


def _multiplying_axis(input: Tensor, scales: Tensor, axis: int) -> int:
    if scales.dtype != input.dtype:
        raise TargetError(
            "npu_quantize",
            f"input is {input.dtype} and scales are {scales.dtype}",
            "give both one dtype, or divide",
        )
    if axis < -2:
        raise TargetError("npu_quantize", f"axis {axis} is below -2", "multiply along -1 or -2")
    return -2 if axis == -2 else -1


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Symmetric quantization, a scale a token: input [..., n] to (int8 [..., n], float32 [...]).

    With x = input * smooth_scales [n]: scale = max|x| / 127 over a row, codes rint(x / scale)
    (op-plugin npu_dynamic_quant.md). A row of zeros gives zeros with scale 0: assumed.
    """
    require_float("npu_dynamic_quant", "input", input)
    refuse("npu_dynamic_quant", others)
    if quant_mode != "pertoken" or codes_of("npu_dynamic_quant", dst_type) != torch.int8:
        raise TargetError(
            "npu_dynamic_quant", "only int8 codes per token are emulated", "use those"
        )
    value = input.float()
    if smooth_scales is not None:
        value = value * smooth_scales.float()
    return per_token(value)


def per_token(value: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of float32 rows and the scale of each row, max|row| / 127."""
    scale = value.abs().amax(-1, keepdim=True) / 127
    return saturate(value / scale.masked_fill(scale == 0, 1)), scale.squeeze(-1)


def npu_anti_quant(
    x: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    dst_dtype: int | None = None,
    **o: Any,
) -> Tensor:
    """(x + offset) * scale: x int8 [..., n], scale and offset [n] or [1], to float16 by default.

    Mind the sign: offset is minus the zero point (op-plugin npu_anti_quant.md and its golden).
    float32 inside, rounded once: assumed. Scale and offset float32 or bfloat16, result float16 or
    bfloat16; extension of kvc8: float32 results.
    """
    refuse("npu_anti_quant", o)
    target = dtype_of("npu_anti_quant", dst_dtype, torch.float16)
    if x.dtype != torch.int8 or target not in _HALF_OR_FLOAT:
        raise TargetError(
            "npu_anti_quant", f"{x.dtype} to {target} is not emulated", "use int8 codes"
        )
    value = x.float()
    if offset is not None:
        value = value + along(offset, x.ndim, -1)
    return (value * along(scale, x.ndim, -1)).to(target).contiguous()


def npu_quantize_per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, y: Tensor) -> None:
    """The op atb::_npu_quantize_per_tensor, per channel despite its name: int8 codes of x into y.

    Rounds after adding the offset, both in half precision: rint(half(x / scale) + zero_point)
    (ATB kernels/elewise/simple_broadcast/kernel/quant_per_channel.cpp:60-76: float16 divides in
    half, bfloat16 in float32 and rounds to float16). x and scale float16 or bfloat16 [..., n] and
    [n] or [1], zero_point int8 or empty. Extension of kvc8: float32 without half steps.
    """
    require_float("_npu_quantize_per_tensor", "x", x)
    step = torch.float32 if x.dtype == torch.float32 else torch.float16
    value = (x.float() / along(scale, x.ndim, -1)).to(step)
    if zero_point.numel():
        value = value + along(zero_point, x.ndim, -1).to(step)
    y.copy_(saturate(value))
