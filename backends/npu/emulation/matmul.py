"""The int8 matmul and the packed form of its scales, on a CPU.

The products are accumulated in int32, exactly. A device reads packed scales as FP19: float32
whose lowest 13 bits are zero.
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.quantization import refuse, saturate
from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import dtype_of

_OP = "npu_quant_matmul"
_FP19 = -0x2000  # 0xFFFFE000, the bits of a float32 that FP19 keeps, as an int32
_OFFSET_AT = 37  # the 9 bits of the offset in a packed scale
_PACKED = 1 << 46
_SCALES = MappingProxyType(  # that results of a dtype may have
    {
        torch.int8: (torch.int64, torch.float32),
        torch.float16: (torch.int64, torch.float32),
        torch.bfloat16: (torch.float32, torch.bfloat16),
        torch.int32: (torch.float32, torch.bfloat16),
        torch.float32: (torch.float32,),
    }
)


def npu_trans_quant_param(
    scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0
) -> Tensor:
    """Packed int64 scales, bits(scale) & 0xFFFFE000 | 1 << 46, the offset a 9-bit int at bit 37.

    scale and offset float32 [n] or [1] (op-plugin npu_trans_quant_param.md). The offset is rounded
    half to even and saturates at -256 and 255 (its golden). round_mode 1 rounds the scale to FP19
    instead of truncating it: half to even is assumed.
    """
    bits = scale.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        bits = bits + 0xFFF + ((bits >> 13) & 1)
    packed = (bits & 0xFFFFE000) | _PACKED
    if offset is not None:
        whole = offset.float().round().clamp(-256, 255).to(torch.int64)
        packed = packed | ((whole & 0x1FF) << _OFFSET_AT)
    return packed.contiguous()


def unpack_scale(packed: Tensor) -> Tensor:
    """The float32 value of packed int64 scales: the low 32 bits, cut to FP19."""
    return (packed.to(torch.int32) & _FP19).view(torch.float32)


def unpack_offset(packed: Tensor) -> Tensor:
    """The offset in packed int64 scales, float32."""
    nine_bits = (packed >> _OFFSET_AT) & 0x1FF
    return torch.where(nine_bits < 256, nine_bits, nine_bits - 512).float()


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **others: Any,
) -> Tensor:
    """Dequantized, or requantized, int8 matmul: x1 int8 [..., m, k], x2 int8 [k, n] to [..., m, n].

    (x1 @ x2 + bias) * scale * pertoken_scale in float32, rounded once to output_dtype; for int8
    (the default) clamp(rint(that + offset)). scale [n] or [1], float32, bfloat16 or packed int64;
    bias int32 [n]; pertoken_scale float32 [m]; offset float32 [n] or [1]. A float or bfloat16 bias
    is added after the scales: assumed. (op-plugin npu_quant_matmul.md; the ops-nn golden.)

    A packed scale is FP19, and so is a float32 scale for float16 and int8 results without
    pertoken_scale: torch_npu packs it (QuantMatmulKernelNpuOpApi.cpp). int8 results of a packed
    scale take the offset packed with it, else the argument. int32 results are the sums, unscaled.

    Extension of kvc8: output_dtype float32, with a float32 scale used in full precision, is exactly
    (x1 @ x2 + bias).to(float32) * scale.
    """
    refuse(_OP, others)
    target = dtype_of(_OP, output_dtype, torch.int8)
    _check(x1, x2, scale, bias, target)
    sums = _products(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        sums += bias
    if target == torch.int32:
        return sums
    value = sums * _factor(scale, pertoken_scale, target)  # of float32: so are the sums, rounded
    if pertoken_scale is not None:
        value = value * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        value = value + bias.float()
    if target != torch.int8:
        return value.to(target)
    return saturate(value + _shift(scale, offset))


def npu_dequant_bias(
    x: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x + bias) * weight_scale of int32 sums x [m, n], rounded once to output_dtype [m, n].

    bias int32 [n]; weight_scale [n], float32 for float16 results and bfloat16 for bfloat16 ones; no
    activation_scale and no float bias (aclnnDequantBias). float32 inside is assumed. Extension of
    kvc8: float32 results, of a float32 scale.
    """
    target = output_dtype or torch.float16
    if activation_scale is not None or (bias is not None and bias.dtype != torch.int32):
        what = "a scale of tokens, or a bias that is not int32, is not emulated"
        raise TargetError("npu_dequant_bias", what, "leave it out")
    wanted = torch.bfloat16 if target == torch.bfloat16 else torch.float32
    if x.dtype != torch.int32 or x.ndim != 2 or weight_scale.dtype != wanted:
        given = f"{x.dtype}{list(x.shape)} with a {weight_scale.dtype} scale"
        raise TargetError(
            "npu_dequant_bias",
            f"{given} is not emulated",
            f"give int32 [m, n] and a {wanted} scale",
        )
    sums = x if bias is None else x + bias
    return (sums.to(torch.float32) * weight_scale.to(torch.float32)).to(target)


def _check(x1: Tensor, x2: Tensor, scale: Tensor, bias: Tensor | None, target: torch.dtype) -> None:
    if x1.dtype != torch.int8 or x2.dtype != torch.int8 or x1.ndim < 2 or x2.ndim != 2:
        raise TargetError(
            _OP,
            f"{x1.dtype}{list(x1.shape)} by {x2.dtype}{list(x2.shape)} is not emulated",
            "multiply int8 [..., m, k] by int8 [k, n]",
        )
    if x1.shape[-1] != x2.shape[0]:
        raise TargetError(
            _OP,
            f"x1 is {list(x1.shape)} and x2 is {list(x2.shape)}",
            "give x2 as [in_features, out_features]",
        )
    for name, parameter in (("scale", scale), ("bias", bias)):
        if parameter is not None and parameter.numel() not in {1, x2.shape[1]}:
            raise TargetError(
                _OP,
                f"{name} has {parameter.numel()} values for {x2.shape[1]} columns",
                "give one a column",
            )
    if scale.dtype not in _SCALES.get(target, ()):
        raise TargetError(_OP, f"no {target} results with a {scale.dtype} scale", "convert it")


def _products(x1: Tensor, x2: Tensor) -> Tensor:
    shape, columns = (*x1.shape[:-1], x2.shape[-1]), x2.t()
    # A column by many rows takes half the time of a row by many columns.
    if x1.numel() == x1.shape[-1] and columns.is_contiguous():
        return torch._int_mm(columns, x1.view(-1, 1)).view(shape)
    return torch._int_mm(x1.reshape(-1, x1.shape[-1]), x2).view(shape)


def _factor(scale: Tensor, pertoken_scale: Tensor | None, target: torch.dtype) -> Tensor:
    if scale.dtype == torch.int64:
        return unpack_scale(scale)
    if pertoken_scale is None and target in (torch.float16, torch.int8):
        return unpack_scale(npu_trans_quant_param(scale))
    return scale.float()


def _shift(scale: Tensor, offset: Tensor | None) -> Tensor:
    if offset is not None:
        return offset.float()
    if scale.dtype == torch.int64:
        return unpack_offset(scale)
    return torch.zeros(1)
