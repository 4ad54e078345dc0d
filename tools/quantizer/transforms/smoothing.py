"""Anti-outlier method m3, msModelSlim's form of AWQ: scale channels of a norm against its linears.

    norm.weight / s,  linear.weight * s    with s = |x|_mean^r / sqrt(max * min)

for the ratio r of 0, 0.05 ... 0.95 whose linears, with rounded weights and exact inputs, differ
least from the float ones on the first text. The other texts are not looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import ModelError
from kvc8.ir.program import expression_of, is_call, is_parameter
from kvc8.tools.quantizer.recipes.vendor_math import fake_quantized_weight
from kvc8.tools.quantizer.sites import LinearSite

RATIOS = tuple(i / 20 for i in range(20))
LEAST = 1e-4


@dataclass(frozen=True)
class NormGroup:
    """The linears that read a norm, the norm's output and its weight."""

    source: Node
    norm: Node
    weights: Sequence[Node]


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
    wanted = [torch.nn.functional.linear(x, weight) for weight in weights]
    best, least = torch.ones_like(size), float("inf")
    for ratio in RATIOS:
        s = size.pow(ratio).clamp(min=LEAST)
        s = s / (s.max() * s.min()).sqrt()
        loss = 0.0
        for weight, y in zip(weights, wanted, strict=True):
            new = torch.nn.functional.linear(x, fake_quantized_weight(weight, s))
            loss += (y - new).float().pow(2).mean().item()
        if loss < least:
            best, least = s, loss
    return best


def smooth(weights: dict[Node, Tensor], group: NormGroup, s: Tensor) -> None:
    """Divide the norm's weight by s and multiply the linears' by it."""
    weights[group.norm] = weights[group.norm] / s
    for weight in group.weights:
        weights[weight] = weights[weight] * s
