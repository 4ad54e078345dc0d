"""SwiGLU, alone and with the quantization around it, and GeGLU, on a CPU; float32 inside.

SwiGLU is rounded once: that nothing is rounded between is assumed. float32 inputs are an extension
of kvc8, except for npu_swiglu_quant, npu_swiglu and npu_geglu, whose goldens take them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from kvc8.backends.npu.emulation.quantization import (
    per_token,
    refuse,
    require_float,
    saturate,
)
from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import codes_of


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half along dim, in the dtype of input (npu_swiglu.md)."""
    require_float("npu_swiglu", "input", input)
    if input.shape[dim] % 2:
        raise TargetError(
            "npu_swiglu", f"dimension {dim} of {list(input.shape)} is odd", "make it even"
        )
    first, second = input.float().chunk(2, dim)
    return (silu(first) * second).to(input.dtype).contiguous()


def npu_geglu(
    input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    """(gelu(gate) * up, gelu(gate)) along dim, in the dtype of input; the gate is the second half.

    With activate_left it is the first. approximate 0 is by erf, 1 by tanh (aclnnGeGluV3.md of
    ops-nn). float16 rounds gelu before it multiplies, in float16 (ge_glu_v2_fp16_align.h); bfloat16
    multiplies in float32 (ge_glu_v2_bf16_align.h).
    """
    op = "npu_geglu"
    require_float(op, "input", input)
    if input.shape[dim] % 2:
        raise TargetError(op, f"dimension {dim} of {list(input.shape)} is odd", "make it even")
    if approximate not in (0, 1):
        raise TargetError(op, f"approximate is {approximate}", "give 0, for erf, or 1, for tanh")
    halves = input.float().chunk(2, dim)
    gate, up = halves if activate_left else reversed(halves)
    wide = gelu(gate, approximate="tanh" if approximate else "none")
    narrow = wide.to(input.dtype)
    product = (narrow.float() if input.dtype is torch.float16 else wide) * up
    return product.to(input.dtype).contiguous(), narrow.contiguous()


def _swiglu(x: Tensor, activate_left: bool) -> Tensor:
    left, right = x.float().chunk(2, -1)
    return silu(left) * right if activate_left else left * silu(right)


def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(int8 codes [T, H], float32 scales [T]) of the SwiGLU of x [T, 2 * H].

    quant_mode 0: clamp(rint(swiglu * smooth_scales + offsets)), so it multiplies
    (swi_glu_quant_static.h:280-282); the scales are zeros: assumed. 1: swiglu * smooth_scales,
    quantized per token. Parameters float32 [G, H] or [H]; group_index holds the last row of each
    group (group_list_type 0) or their sizes (1). silu is on the right half by default.
    """
    op = "npu_swiglu_quant"
    require_float(op, "x", x)
    if quant_mode not in (0, 1) or dst_type not in (None, torch.int8):
        raise TargetError(op, f"quant_mode {quant_mode} to {dst_type} is not emulated", "use int8")
    groups = None if group_index is None else _groups(op, group_index, group_list_type, len(x))
    value = _swiglu(x, activate_left)
    if smooth_scales is not None:
        value = value * _per_row(op, smooth_scales, groups)
    if quant_mode == 1:
        return per_token(value)
    if offsets is not None:
        value = value + _per_row(op, offsets, groups)
    return saturate(value), torch.zeros(x.shape[:-1])


def _groups(op: str, index: Tensor, list_type: int, rows: int) -> Tensor:
    ends = index.long() if list_type == 0 else index.long().cumsum(0)
    if int(ends[-1]) != rows:
        raise TargetError(op, f"the groups end at row {int(ends[-1])} of {rows}", "cover them all")
    return torch.searchsorted(ends, torch.arange(rows), right=True)


def _per_row(op: str, parameter: Tensor, groups: Tensor | None) -> Tensor:
    if groups is not None:
        return parameter.float()[groups]
    if parameter.ndim > 1 and parameter.shape[0] != 1:
        raise TargetError(op, f"parameters of {parameter.shape[0]} groups", "give group_index")
    return parameter.float()


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    swiglu_mode: int = 0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """(int8 codes [T, H], float32 scales [T]) of the SwiGLU of x [T, 2 * H].

    x int32 is taken times weight_scale [1, 2 * H] and activation_scale [T, 1]; an int32 bias is
    added before, a float one after: assumed. x may be float16 or bfloat16, without those.
    quant_mode 0: clamp(rint(swiglu / quant_scale + quant_offset)), so it divides
    (dequant_swiglu_quant_static_base.hpp:288); the scales are zeros: assumed. 1: swiglu *
    quant_scale, quantized per token. Parameters float32 [1, H]. silu is on the right half by
    default.
    """
    op = "npu_dequant_swiglu_quant"
    refuse(op, others)
    target = codes_of(op, dst_type)
    if quant_mode not in (0, 1) or swiglu_mode != 0 or target != torch.int8:
        raise TargetError(op, "only quant_mode 0 and 1 to int8 are emulated", "use one of them")
    value = _swiglu(_dequantized(op, x, weight_scale, activation_scale, bias), activate_left)
    if quant_mode == 1:
        return per_token(value if quant_scale is None else value * quant_scale.float())
    if quant_scale is None:
        raise TargetError(op, "quant_mode 0 without quant_scale", "give one")
    value = value / quant_scale.float()
    if quant_offset is not None:
        value = value + quant_offset.float()
    return saturate(value), torch.zeros(x.shape[:-1])


def _dequantized(
    op: str,
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if x.dtype != torch.int32:
        require_float(op, "x", x)
        refuse(op, {"weight_scale": weight_scale, "activation_scale": activation_scale})
        refuse(op, {"bias": bias})
        return x
    if weight_scale is None:
        raise TargetError(op, "int32 without a weight scale", "give one")
    if bias is not None and bias.dtype == torch.int32:
        x = x + bias
    value = x.float() * weight_scale.float()
    if activation_scale is not None:
        value = value * activation_scale.float().reshape(*x.shape[:-1], 1)
    return value if bias is None or bias.dtype == torch.int32 else value + bias.float()
