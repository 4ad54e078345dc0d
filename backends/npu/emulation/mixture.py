"""The ops of a mixture of experts on a CPU: gating, routing, grouped matmul and the weighted sum.

Rows of one expert lie together, in the order of the experts and, within one, of the tokens. What is
counted here is counted by tensors and no numbers of Python, so that a twin of the call in double
precision, whose gating may choose otherwise, is right by itself (ir/precision/twins.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvc8.backends.npu.emulation.quantization import per_token, refuse, require_float
from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import dtype_of

_GATING = "npu_moe_gating_top_k"
_ROUTING = "npu_moe_init_routing_v2"
_GROUPED = "npu_grouped_matmul"


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(the k largest of softmax(x), their experts int32, row_idx int32), x [..., E] to [..., k].

    Softmax in float32, rounded to the dtype of x before the choice, equal ones by the lower expert
    (the golden of op-plugin test_npu_moe_gating_top_k_softmax.py). Of rows that are `finished` the
    expert is E. row_idx counts down the columns (op-plugin npu_moe_gating_top_k_softmax.md).
    """
    require_float("npu_moe_gating_top_k_softmax", "x", x)
    probabilities = torch.softmax(x.float(), -1).to(x.dtype)
    experts = _first_largest(probabilities, k)
    values = probabilities.gather(-1, experts)
    if finished is not None:
        experts = experts.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    rows = torch.arange(values.numel()).reshape(k, -1).t().reshape(values.shape)
    return values, experts.to(torch.int32), rows.to(torch.int32).contiguous()


def _first_largest(x: Tensor, k: int) -> Tensor:
    """The places of the k largest values of each row, of equal ones those that come first."""
    return x.argsort(dim=-1, descending=True, stable=True)[..., :k]


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k] like x, experts int32 [T, k], all probabilities float32 [T, E]) of x [T, E].

    p is softmax(x) (norm_type 0) or sigmoid(x) (1); p + bias chooses: of group_count groups of
    experts the k_group of the largest score (their largest value, or with group_select_mode 1 the
    sum of their two largest), and in those the k largest. Weights are the chosen p, with sigmoid
    divided by their sum + eps, times routed_scaling_factor. float32 inside, rounded once; equal
    ones by the lower index. (op-plugin npu_moe_gating_top_k.md, its golden, and the kernel
    moe_gating_top_k_without_group.h of ops-transformer.)
    """
    refuse(_GATING, others)
    require_float(_GATING, "x", x)
    if renorm != 0:
        raise TargetError(_GATING, f"renorm {renorm} is not known", "use 0")
    every = torch.sigmoid(x.float()) if norm_type == 1 else torch.softmax(x.float(), -1)
    scores = every if bias is None else every + bias.float()
    if group_count > 1:
        scores = _within_groups(scores, k_group, group_count, group_select_mode)
    experts = _first_largest(scores, k)
    weights = every.gather(1, experts)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, experts.to(torch.int32), every if out_flag else torch.zeros_like(every)


def _within_groups(scores: Tensor, k_group: int, group_count: int, mode: int) -> Tensor:
    """The scores, minus infinity where the group of an expert is not among the best."""
    grouped: Tensor = scores.unflatten(1, (group_count, -1))
    best = grouped.topk(2, -1).values.sum(-1) if mode == 1 else grouped.amax(-1)
    out = torch.ones_like(best, dtype=torch.bool)
    out = out.scatter(1, _first_largest(best, k_group), value=False)
    return grouped.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(1)


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    row_idx_type: int = 0,
    drop_pad_mode: int = 0,
    expert_capacity: int = -1,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [T*k, H], row_idx int32 [T*k], rows an expert int64 [E], scale of rows float32 [T*k]).

    The rows of x [T, H] by the experts int32 [T, k] that they go to. row_idx says where the row of
    token t and choice j lies, at t*k + j (row_idx_type 0), or which t*k + j a row is (1). Counts
    are sums so far (expert_tokens_num_type 0) or of each expert (1). quant_mode 1 quantizes each
    row as npu_dynamic_quant does; with -1 the scales are zeros: assumed. Experts outside of
    active_expert_range, a limit of rows and padding are not emulated. (op-plugin
    npu_moe_init_routing_v2.md and the golden of its test.)
    """
    whole = tuple(others.pop("active_expert_range", ())) in ((), (0, expert_num))
    refuse(_ROUTING, others)
    rows = expert_idx.numel()
    if not whole or active_num not in (-1, 0, rows) or (drop_pad_mode, expert_capacity) != (0, -1):
        raise TargetError(_ROUTING, "some of the rows only is not emulated", "route them all")
    if quant_mode not in (-1, 1) or expert_tokens_num_type not in (0, 1):
        counted = f"expert_tokens_num_type {expert_tokens_num_type}"
        what = f"quant_mode {quant_mode} with {counted} is not emulated"
        raise TargetError(_ROUTING, what, "use -1 or 1, and 0 or 1")
    order = expert_idx.flatten().argsort(stable=True)
    row_idx = order if row_idx_type == 1 else order.argsort()
    counts = _counts(expert_idx, expert_num)
    expanded = x[order // expert_idx.shape[1]]
    scale = torch.zeros(rows)
    if quant_mode == 1:
        expanded, scale = per_token(expanded.float())
    counts = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
    return expanded, row_idx.to(torch.int32), counts, scale


def _counts(experts: Tensor, count: int) -> Tensor:
    """How many rows go to each expert, int64 [count]."""
    return (experts.flatten()[:, None] == torch.arange(count)).sum(0)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: int | None = None,
    **others: Any,
) -> list[Tensor]:
    """[the rows of x [M, K], each by its own expert's weight [E, K, N]]: [M, N].

    group_list int64 [E] says where the rows of each expert end (group_list_type 0) or how many
    there are (1). Floats: x @ w (+ bias [E, N]), in float32, rounded once. int8 x and weight:
    (x @ w) * scale [E, N] * per_token_scale [M] in float32, rounded once to float16 or bfloat16.
    One x, one weight, split_item 2 or 3, group_type 0, no activation; the others are not emulated.
    Rows of no expert give zeros: assumed. (op-plugin npu_grouped_matmul.md, formulas 1 and 3.)
    Extension of kvc8: int8 to float32.
    """
    refuse(_GROUPED, others)
    one = len(x) == len(weight) == 1 and split_item in (2, 3) and group_type == 0
    if not one or group_list is None or group_list_type not in (0, 1) or act_type:
        raise TargetError(
            _GROUPED, "is emulated for one x by one weight in groups of rows", "call it so"
        )
    target = dtype_of(_GROUPED, output_dtype, x[0].dtype)
    if x[0].dtype != torch.int8:
        require_float(_GROUPED, "x", x[0])
    elif scale is None or per_token_scale is None or bias is not None:
        raise TargetError(
            _GROUPED, "is emulated in int8 with scales of weight and rows", "give both"
        )
    counts = (
        group_list if group_list_type == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    )
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    out = torch.zeros(len(x[0]), weight[0].shape[2])
    for expert, matrix in enumerate(weight[0].unbind()):
        mine = (owner == expert).nonzero().flatten()
        made = _product(x[0][mine], matrix)
        if scale is not None and per_token_scale is not None:
            made = made * scale[0][expert].float() * per_token_scale[0][mine].unsqueeze(-1)
        if bias is not None:
            made = made + bias[0][expert].float()
        out = out.to(made.dtype).index_copy(0, mine, made)
    return [out.to(target)]


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows by a matrix, in float32; exact of int8, whose sums float64 holds whole."""
    if rows.dtype == torch.int8:
        return (rows.double() @ matrix.double()).float()
    return rows.float() @ matrix.float()


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """The sum of the rows of each token, weighted: rows [T*k, H] and probs [T, k] to [T, H].

    The row of token t and choice j lies at sorted_indices int32 [T*k], t*k + j. One product and one
    sum after another in float32, in the order of j, rounded once at the end (the kernel
    moe_token_unpermute.h of ops-transformer; the golden of op-plugin rounds each product to the
    dtype). Without probs the rows are only put back.
    """
    if padded_mode or restore_shape is not None:
        raise TargetError("npu_moe_token_unpermute", "padding is not emulated", "leave it out")
    require_float("npu_moe_token_unpermute", "permuted_tokens", permuted_tokens)
    rows = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return rows
    each: Tensor = rows.float().unflatten(0, probs.shape)
    total: Tensor = each[:, 0] * probs[:, :1].float()
    for j in range(1, probs.shape[1]):
        total = total + each[:, j] * probs[:, j : j + 1].float()
    return total.to(permuted_tokens.dtype)
