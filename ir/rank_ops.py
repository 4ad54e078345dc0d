"""The ops of a program that several ranks run: each holds a part of the model, and they add up.

What one rank does alone is computed here. What all ranks do together has no value on one of them:
`kvc8.ir.ranks.side_by_side` writes all ranks out as one program, which is the CPU reference, and
passes/lower_collectives.py puts torch's functional collectives in their place.
"""

from typing import NoReturn

import torch
from torch import Tensor

from kvc8.ir.ops import WIDEST


@torch.library.custom_op("kvc8::int_linear", mutates_args=())
def _int_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weight^T + bias, exact in int32: the sums of `quant_linear` before they are scaled.

    x int8 [..., K], weight int8 [O, K], bias int32 [O]; gives int32 [..., O]. The sums of all ranks
    together fit where those of the whole weight do: K of all ranks at most 131,071.
    """
    sums = torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t())
    return (sums if bias is None else sums + bias).reshape(*x.shape[:-1], -1)


@_int_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.dtype == weight.dtype == torch.int8, lambda: "x and weight are not both int8")
    torch._check(x.shape[-1] == weight.shape[1], lambda: "x and weight differ in width")
    torch._check(weight.shape[1] <= WIDEST, lambda: "an int32 sum this wide can overflow")
    if bias is not None:
        torch._check(bias.dtype == torch.int32, lambda: "bias is not int32")
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32)


@torch.library.custom_op("kvc8::dequant_sum", mutates_args=())
def _dequant_sum(
    sums: Tensor, deq_scale: Tensor, quant_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(sums + quant_bias)*deq_scale, then cast: what `quant_linear` does with its int32 sums.

    sums int32 [..., O], deq_scale float32 [O], quant_bias int32 [O]; gives dtype [..., O].
    """
    whole = sums if quant_bias is None else sums + quant_bias
    return (whole.float() * deq_scale).to(dtype)


@_dequant_sum.register_fake
def _(sums: Tensor, deq_scale: Tensor, quant_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    torch._check(sums.dtype == torch.int32, lambda: "sums are not int32")
    torch._check(deq_scale.dtype == torch.float32, lambda: "deq_scale is not float32")
    torch._check(deq_scale.shape == sums.shape[-1:], lambda: "deq_scale is not one an output")
    if quant_bias is not None:
        torch._check(quant_bias.dtype == torch.int32, lambda: "quant_bias is not int32")
    return torch.empty_like(sums, dtype=dtype)


@torch.library.custom_op("kvc8::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, ranks: int) -> Tensor:
    """The sum over all ranks of their x, of its shape and dtype, the same on each.

    Taken from the first rank to the last, each addition rounded to the dtype of x.
    """
    _refuse("all_reduce")


@_all_reduce.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kvc8::all_gather", mutates_args=())
def _all_gather(x: Tensor, ranks: int) -> Tensor:
    """The x [1, T, n] of all ranks along the last dimension, [1, T, ranks*n], the same on each."""
    _refuse("all_gather")


@_all_gather.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    torch._check(x.dim() == 3, lambda: "x is not [1, T, n]")
    torch._check(x.shape[0] == 1, lambda: "x is not [1, T, n]")
    return x.new_empty(*x.shape[:-1], x.shape[-1] * ranks)


def _refuse(op: str) -> NoReturn:
    what = "one rank has no value of what all do together"
    raise RuntimeError(f"kvc8.{op}: {what}; run the program of side_by_side, or lower it")


int_linear = torch.ops.kvc8.int_linear.default
dequant_sum = torch.ops.kvc8.dequant_sum.default
all_reduce = torch.ops.kvc8.all_reduce.default
all_gather = torch.ops.kvc8.all_gather.default
