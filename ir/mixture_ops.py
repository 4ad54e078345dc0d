"""The ops of a mixture of experts: rows to their experts, each expert's linear, and back.

Rows of one expert lie together: in the order of the experts and, within one, of the tokens. None of
these looks at a number of rows in Python, so that a twin of a call (ir/precision/twins.py), whose
router may choose otherwise where two experts are nearly equal, is right by itself.
"""

import torch
from torch import Tensor

from kvc8.ir.ops import WIDEST


@torch.library.custom_op("kvc8::route", mutates_args=())
def _route(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of x [T, H] as often as they have experts int [T, k], sorted by expert.

    Gives rows [T*k, H]; places int32 [T*k], where the row of token t and choice j lies, at t*k + j;
    and how many rows each of `count` experts has, int64 [count].
    """
    order = experts.flatten().argsort(stable=True)
    counts = (experts.flatten()[:, None] == torch.arange(count)).sum(0)
    return x[order // experts.shape[1]], order.argsort().to(torch.int32), counts


@_route.register_fake
def _(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.shape[0] == experts.shape[0], lambda: "x and experts differ in tokens")
    rows = experts.shape[0] * experts.shape[1]
    places = experts.new_empty((rows,), dtype=torch.int32)
    return x.new_empty((rows, x.shape[1])), places, experts.new_empty((count,), dtype=torch.int64)


@torch.library.custom_op("kvc8::combine", mutates_args=())
def _combine(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the rows of each token: rows [T*k, H], weights [T, k] to [T, H].

    places int32 [T*k] of `route`. In float32, or float64 where that is the rows' dtype, one
    product and sum after another, rounded once.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    each = rows[places.long()].to(wide).unflatten(0, weights.shape)
    total: Tensor = each[:, 0] * weights[:, :1].to(wide)
    for j in range(1, weights.shape[1]):
        total = total + each[:, j] * weights[:, j : j + 1].to(wide)
    return total.to(rows.dtype)


@_combine.register_fake
def _(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    torch._check(rows.shape[:1] == places.shape, lambda: "places is not one a row")
    return rows.new_empty((weights.shape[0], rows.shape[1]))


@torch.library.custom_op("kvc8::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Each row by the linear of its own expert: weight [E, out, in], bias [E, out].

    x [R, in] and counts int64 [E] of `route`. Gives [R, out].
    """
    owner = owners(counts)
    out = x.new_zeros(len(x), weight.shape[1])
    for expert, matrix in enumerate(weight.unbind()):
        mine = (owner == expert).nonzero().flatten()
        made = x[mine] @ matrix.t()
        out = out.index_copy(0, mine, made if bias is None else made + bias[expert])
    return out


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    torch._check(x.shape[1] == weight.shape[2], lambda: "x and weight differ in width")
    torch._check(counts.shape[0] == weight.shape[0], lambda: "counts and weight differ in experts")
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("kvc8::dynamic_grouped_linear", mutates_args=())
def _dynamic_grouped_linear(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(x·weight^T)*weight_scale*scale by each row's own expert: exact, then float32, then cast.

    x int8 [R, K] and scale float32 [R] of `quantize_tokens`; weight int8 [E, O, K], weight_scale
    float32 [E, O], counts int64 [E] of `route`; gives dtype [R, O]. K as in `quant_linear`: float64
    holds such sums whole.
    """
    owner = owners(counts)
    out = torch.zeros(len(x), weight.shape[1])
    for expert, matrix in enumerate(weight.unbind()):
        mine = (owner == expert).nonzero().flatten()
        sums = (x[mine].double() @ matrix.double().t()).float()
        made = sums * weight_scale[expert] * scale[mine].unsqueeze(-1)
        out = out.to(made.dtype).index_copy(0, mine, made)
    return out.to(dtype)


@_dynamic_grouped_linear.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(x.dtype == weight.dtype == torch.int8, lambda: "x and weight are not both int8")
    torch._check(x.shape[1] == weight.shape[2], lambda: "x and weight differ in width")
    torch._check(weight.shape[2] <= WIDEST, lambda: "an int32 sum this wide can overflow")
    torch._check(scale.shape == x.shape[:1], lambda: "scale is not one a row of x")
    torch._check(weight_scale.dtype == torch.float32, lambda: "weight_scale is not float32")
    torch._check(
        weight_scale.shape == weight.shape[:2], lambda: "weight_scale is not one an output"
    )
    torch._check(counts.shape[0] == weight.shape[0], lambda: "counts and weight differ in experts")
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)


def owners(counts: Tensor) -> Tensor:
    """The expert of each row, where counts int64 [E] says how many each has."""
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


route = torch.ops.kvc8.route.default
combine = torch.ops.kvc8.combine.default
grouped_linear = torch.ops.kvc8.grouped_linear.default
dynamic_grouped_linear = torch.ops.kvc8.dynamic_grouped_linear.default
