"""Anti-outlier method m3, msModelSlim's form of AWQ: scale channels of a norm against its linears.

    norm.weight / s,  linear.weight * s    with s = |x|_mean^r / sqrt(max * min)

for the ratio r of 0, 0.05 ... 0.95 whose linears, with rounded weights and exact inputs, differ
least from the float ones on the first text. The other texts are not looked at.

Most ratios are far from the best, and their loss is over that of the best before it is summed up:
so it is summed some rows of the weights at a time, as long as it may be the least. That is not
msModelSlim's order of summing. Between ratios that come close to the best its own order decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import ModelError
from kvc8.ir.expression import stored_names
from kvc8.ir.program import expression_of, is_call, is_parameter
from kvc8.tools.quantizer.recipes.vendor_math import fake_quantized_weight
from kvc8.tools.quantizer.sites import LinearSite

RATIOS = tuple(i / 20 for i in range(20))
LEAST = 1e-4
USUAL = 0.22  # a ratio near the best of most norms, from which the search begins
ROWS = 192  # of a weight, whose loss is summed at a time
# By what part of itself a loss may differ that is summed in another order. k products in float32
# differ by about sqrt(k) * 2**-24 of |x| |w|, for k of 8,192 by 5e-6, where int8 leaves an error of
# 2**-8 / sqrt(3), 2e-3: an error by 1 in 400, a loss of 10,000 such errors, that are rounded each
# by itself, by 1 in 40,000. Of outputs in float16 one in 100 moves, by a quarter: as much. This
# is 40 times as much; who is as close to the best is summed again.
CLOSE = 1e-3

Pair = tuple[Tensor, Tensor]  # a weight [out, in], and what it gives of x, [..., out]


@dataclass(frozen=True)
class NormGroup:
    """The linears that read a norm, the norm's output and its weight."""

    source: Node
    norm: Node
    weights: Sequence[Node]

    @property
    def norm_name(self) -> str:
        """What the norm's weight is stored as."""
        return next(stored_names(expression_of(self.norm)))


def groups(sites: Sequence[LinearSite]) -> list[NormGroup]:
    """The norms of a model whose output is read by linears only.

    Raises ModelError where a norm has no weight of its own to take the scales.
    """
    by_source: dict[Node, list[Node]] = {}
    for site in sites:
        by_source.setdefault(site.source, []).append(site.weight)
    found = []
    for source, weights in by_source.items():
        if "norm" not in str(source.meta.get("origin", "")):
            continue  # o_proj and down_proj read no norm
        norms = [n for n in source.all_input_nodes if is_parameter(n)]
        plain = is_call(source, torch.ops.aten.mul.Tensor) and len(norms) == 1
        if not plain or expression_of(norms[0]).op not in ("stored", "cast"):
            raise ModelError(
                f"{source.meta['origin']}",
                "has no weight that its output is a product of",
                "quantize with --anti-method none",
            )
        if len(source.users) == len(weights):
            found.append(NormGroup(source, norms[0], weights))
    return found


def scales(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The scales s [in] of a group, from the norm's output x on one text."""
    size = x.abs().view(-1, x.shape[-1]).mean(0)
    tried, losses, least = [scales_by(size, r) for r in RATIOS], dict[int, float](), float("inf")
    pairs = [(weight, torch.nn.functional.linear(x, weight)) for weight in weights]
    for i in sorted(range(len(tried)), key=lambda i: abs(RATIOS[i] - USUAL)):
        losses[i] = _loss_up_to(least * (1 + CLOSE), tried[i], x, pairs)
        least = min(least, losses[i])
    if least == float("inf"):  # none has a loss that is a number
        return torch.ones_like(size)
    close = [s for i, s in enumerate(tried) if losses[i] <= least * (1 + CLOSE)]
    return min(close, key=lambda s: loss_of(s, x, pairs)) if len(close) > 1 else close[0]


def scales_by(size: Tensor, ratio: float) -> Tensor:
    """The scales of a ratio, from the mean sizes of channels."""
    s = size.pow(ratio).clamp(min=LEAST)
    return s / (s.max() * s.min()).sqrt()


def loss_of(s: Tensor, x: Tensor, pairs: Sequence[Pair]) -> float:
    """The loss as msModelSlim sums it up."""
    loss = 0.0
    for weight, y in pairs:
        new = torch.nn.functional.linear(x, fake_quantized_weight(weight, s))
        loss += new.sub_(y).float().pow_(2).mean().item()
    return loss


def _loss_up_to(most: float, s: Tensor, x: Tensor, pairs: Sequence[Pair]) -> float:
    """The loss, or some number over `most` where it is that. Small weights tell as much."""
    loss = 0.0
    for weight, y in sorted(pairs, key=lambda pair: len(pair[0])):
        for rows, part in zip(weight.split(ROWS), y.split(ROWS, -1), strict=True):
            new = torch.nn.functional.linear(x, fake_quantized_weight(rows, s))
            loss += new.sub_(part).float().pow_(2).sum().item() / y.numel()
            if loss > most:
                return loss
    return loss


def smooth(weights: dict[Node, Tensor], group: NormGroup, s: Tensor) -> None:
    """Divide the norm's weight by s and multiply the linears' by it."""
    weights[group.norm] = weights[group.norm] / s
    for weight in group.weights:
        weights[weight] = weights[weight] * s
