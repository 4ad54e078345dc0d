"""How far a model's next-token distributions are from another's: figures that are summed up.

For each token whose successor the text gives: the log probability both give that successor, the
divergence KL(reference || model) in nats, and whether both think the same token the likeliest.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS = 64  # at a time: float32 of 64 rows of a vocabulary of 150,000 are 38 MB


@dataclass
class Figures:
    """What was seen of one model so far. `perplexity` needs a token, and the others two models."""

    losses: list[Tensor] = field(default_factory=list)  # of each window, float64 [T]
    kl: list[Tensor] = field(default_factory=list)  # of each window, float64 [T]
    same: list[Tensor] = field(default_factory=list)  # of each window, bool [T]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log probability of the text's tokens."""
        return math.exp(float(torch.cat(self.losses).mean()))

    @property
    def kl_mean(self) -> float:
        """Mean KL(reference || model), in nats."""
        return float(torch.cat(self.kl).mean())

    @property
    def kl_p99(self) -> float:
        """What 99 % of the tokens' divergences do not exceed, in nats."""
        return float(torch.cat(self.kl).quantile(0.99))

    @property
    def top1(self) -> float:
        """The share of tokens where both think the same successor the likeliest."""
        return float(torch.cat(self.same).double().mean())

    @property
    def kl_by_position(self) -> Tensor:
        """Mean over the windows of each position's divergence: float64 [T]; windows alike long."""
        return torch.stack(self.kl).mean(0)

    def between(self, start: int, stop: int) -> "Figures":
        """Those of the tokens from `start` up to `stop` of each window."""
        each = (self.losses, self.kl, self.same)
        return Figures(*([part[start:stop] for part in parts] for parts in each))

    def add(self, model: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """Take the logits of a window, [T, vocabulary] each, and its tokens [T]."""
        parts = [
            _compare(model[rows], reference[rows], tokens[1:][rows])
            for rows in _chunks(len(tokens) - 1)
        ]
        losses, kl, same = (torch.cat(part) for part in zip(*parts, strict=True))
        self.losses.append(losses)
        self.kl.append(kl)
        self.same.append(same)

    def add_alone(self, reference: Tensor, tokens: Tensor) -> None:
        """Take the logits of the reference itself: its losses only."""
        parts = [
            _loss(reference[rows].float().log_softmax(-1), tokens[1:][rows])
            for rows in _chunks(len(tokens) - 1)
        ]
        self.losses.append(torch.cat(parts))


def _chunks(count: int) -> list[slice]:
    return [slice(at, min(at + ROWS, count)) for at in range(0, count, ROWS)]


def _compare(model: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ours, theirs = model.float().log_softmax(-1), reference.float().log_softmax(-1)
    # In float32 a sum of rounded terms may fall below zero by a rounding; a divergence cannot.
    kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0)
    return _loss(ours, targets), kl.double(), ours.argmax(-1) == theirs.argmax(-1)


def _loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(1, targets[:, None])[:, 0].double()
