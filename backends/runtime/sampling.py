"""Choose the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir.errors import TargetError


@dataclass(frozen=True)
class Sampling:
    """How to choose: the likeliest token at temperature 0, else at random, repeatably."""

    temperature: float = 0.0
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise TargetError(
                "temperature", f"is {self.temperature}", "give 0 or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise TargetError("top_p", f"is {self.top_p}", "give a number above 0 and at most 1")

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of one sequence, whatever runs beside it."""
        return torch.Generator().manual_seed(self.seed + index)


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Choose a token by its logits [vocabulary], of any float dtype, on the CPU."""
    if not bool(logits.isfinite().any()) or bool(logits.isnan().any()):
        raise TargetError("logits", "hold no numbers", "check the model with kvc8-verify")
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = (logits.double() / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        weights = _likeliest(weights, sampling.top_p)
    return int(torch.multinomial(weights, 1, generator=random))


def _likeliest(weights: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest tokens whose sum first reaches top_p."""
    ordered, order = weights.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    return torch.zeros_like(weights).scatter(0, order, ordered.where(before < top_p, 0.0))
