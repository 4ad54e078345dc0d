"""RMS norms, alone and with the addition before and the quantization after them, on a CPU.

Where half precision is named, float32 is taken as well (an extension of kvc8, not legal on a
device): a step that rounds to the dtype of x then rounds nothing.
"""

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.quantization import require_float, saturate
from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import codes_of


def reciprocal_deviation(x: Tensor, rank: int, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x * x) + epsilon) over the last rank dims, float32, kept as ones."""
    dims = tuple(range(-rank, 0))
    return x.float().square().mean(dims, keepdim=True).add_(epsilon).rsqrt_()


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """(input * rstd * gamma in the dtype of input, rstd float32), normalized over gamma's dims.

    float32 inside, rounded once: assumed, the golden of op-plugin has it so. (npu_rms_norm.md.)
    """
    require_float("npu_rms_norm", "input", input)
    rstd = reciprocal_deviation(input, gamma.ndim, epsilon)
    normed = (input.float() * rstd).mul_(gamma).to(input.dtype)
    return normed.contiguous(), rstd.contiguous()


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    """(npu_rms_norm of x, rstd, x) where x = x1 + x2, rounded to their dtype before the norm.

    (npu_add_rms_norm.md and its golden.)
    """
    x = _sum("npu_add_rms_norm", x1, x2)
    return *npu_rms_norm(x, gamma, epsilon), x


def _sum(op: str, x1: Tensor, x2: Tensor) -> Tensor:
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        raise TargetError(
            op,
            f"x1 is {x1.dtype}{list(x1.shape)} and x2 is {x2.dtype}{list(x2.shape)}",
            "give both one shape and dtype",
        )
    require_float(op, "x1", x1)
    return (x1 + x2).contiguous()


def npu_rms_norm_quant(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    offset: Tensor,
    epsilon: float = 1e-06,
    *,
    dst_dtype: int | None = None,
) -> Tensor:
    """int8 codes of the norm: clamp(rint(half((x * rstd * gamma + beta) / scale + offset))).

    It divides by scale: the kernels and three goldens do, although two documents say it multiplies
    (ATB kernels/norm/common/op_kernel/common_quant.h:57, ops-nn rms_norm_quant.h:441). The kernel
    multiplies by 1 / scale in float32 and rounds to float16 before it rounds to an integer. x,
    gamma, beta and scale [1] are of one dtype, offset int8 [1]. gamma and beta are [D] or [1, D],
    and unlike npu_rms_norm it normalizes over the last dimension in both forms (its golden).
    """
    require_float("npu_rms_norm_quant", "x", x)
    width = x.shape[-1:]
    for name, given in (("gamma", gamma), ("beta", beta)):
        if given.shape not in (width, (1, *width)):
            what = f"{name} is {list(given.shape)} and x {list(x.shape)}"
            do = "give one value for each of the last dimension of x"
            raise TargetError("npu_rms_norm_quant", what, do)
    rstd = reciprocal_deviation(x, 1, epsilon)
    normed = x.float() * rstd * gamma.float().flatten() + beta.float().flatten()
    value = normed * (1 / scale.float()) + offset.float()
    if x.dtype != torch.float32:
        value = value.half()
    return saturate(value, codes_of("npu_rms_norm_quant", dst_dtype))


def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-06,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes with scales1, codes with scales2, x = x1 + x2), x rounded to the dtype of x1.

    The norm rounds to that dtype after x * rstd and after * gamma (ops-nn add_rms_norm_quant.h for
    float16; assumed for bfloat16, and for beta, added after them). Then, in float32,
    clamp(rint(norm / scales + zero_points)), or norm * scales without div_mode. Scales float32 of
    the shape of gamma with zero points int32, or bfloat16 with bfloat16. Without scales2 the second
    codes are zeros: a device leaves them undefined.
    """
    op = "npu_add_rms_norm_quant"
    x = _sum(op, x1, x2)
    for scales in (scales1, scales2):
        if axis != -1 or (scales is not None and scales.shape != gamma.shape):
            raise TargetError(op, "scales do not have the shape of gamma", "expand them to it")
    wide = x.float()
    rstd = reciprocal_deviation(wide, gamma.ndim, epsilon)
    normed = (wide * rstd).to(x.dtype) * gamma
    if beta is not None:
        normed = normed + beta
    target = codes_of(op, dst_type)
    first = _codes(normed, scales1, zero_points1, div_mode, target)
    second = torch.zeros_like(first)
    if scales2 is not None:
        second = _codes(normed, scales2, zero_points2, div_mode, target)
    return first, second, x


def _codes(
    value: Tensor, scales: Tensor, zero_points: Tensor | None, div_mode: bool, target: torch.dtype
) -> Tensor:
    scales = scales.float()  # a product of the two is float32 too, whatever value is
    value = value / scales if div_mode else value * scales
    return saturate(value if zero_points is None else value.add_(zero_points), target)
