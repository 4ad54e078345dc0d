"""How far a tensor is from what it stands for, as figures."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """The difference of two float tensors, in float64."""

    largest: float  # absolute
    relative: float  # root of the mean square, as a part of that of what it should be

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio in dB."""
        return -20 * math.log10(self.relative) if self.relative else math.inf


@dataclass(frozen=True)
class CodeGap:
    """Int8 codes beside those that they stand for."""

    by: tuple[int, int, int]  # how many differ by one, by two, and by more
    of: int
    saturated: float  # the share at -128 or 127


def measure(old: Tensor, new: Tensor) -> Gap | CodeGap:
    """How far a tensor with elements is from what it stands for: floats, or whole numbers."""
    return gap(old, new) if old.is_floating_point() else codes(old, new)


def gap(old: Tensor, new: Tensor) -> Gap:
    """How far floats are from those they stand for, of any shape of as many elements.

    Elements that are equal differ by nothing, infinities too.
    """
    a, b = old.double().flatten(), new.double().flatten()
    off = torch.where(a == b, 0.0, a - b)
    power = a.masked_fill(~a.isfinite(), 0).square().mean()
    relative = float((off.square().mean() / power).sqrt()) if power else float(off.any())
    return Gap(float(off.abs().max()), relative)


def codes(old: Tensor, new: Tensor) -> CodeGap:
    """How far int8 codes are from those they stand for."""
    off = (old.flatten().int() - new.flatten().int()).abs()
    by = (int((off == 1).sum()), int((off == 2).sum()), int((off > 2).sum()))
    return CodeGap(by, off.numel(), saturated(new))


def saturated(found: Tensor) -> float:
    """The share of int8 codes that are at an end."""
    return float(((found == -128) | (found == 127)).double().mean())


def next_token(base: Tensor, made: Tensor) -> tuple[float, bool]:
    """KL(base || made) of logits [vocabulary] in nats, and whether their likeliest is the same."""
    a, b = (logits.double().log_softmax(-1) for logits in (base, made))
    divergence = float((a.exp() * (a - b)).sum())
    # a sum of rounded terms may fall below zero by a rounding; a divergence cannot
    return max(divergence, 0.0), bool(base.argmax() == made.argmax())
