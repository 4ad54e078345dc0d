"""How far what a device gave is from what the emulation gave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.tools.device_checker.bounds import Within

EQUAL, BY_ONE, BY_MORE = "equal", "off by one", "off by more"
ONE = Within()


@dataclass(frozen=True)
class Apart:
    """The worst of an op's results; codes count in steps, floats in units of the largest value."""

    outcome: str
    most: float
    share: float  # of the values that differ at all
    values: int = 0

    @property
    def figure(self) -> str:
        """In words."""
        if self.outcome == EQUAL:
            return EQUAL
        return f"{self.outcome}: {self.most:.3g} at most, {self.share:.2%} of values"


def apart(got: Sequence[Tensor], want: Sequence[Tensor], within: Within = ONE) -> Apart:
    """Compare results one by one; dtype and shape are part of them.

    Off by one is what lies within the bounds of two right answers, and by more what does not.
    """
    if len(got) != len(want):
        return Apart(BY_MORE, float("inf"), 1.0)
    found = [_pair(a, b, within) for a, b in zip(got, want, strict=True)]
    order = (EQUAL, BY_ONE, BY_MORE)
    return max(found, key=lambda x: (order.index(x.outcome), x.most), default=Apart(EQUAL, 0, 0))


def _pair(got: Tensor, want: Tensor, within: Within) -> Apart:
    if got.dtype is not want.dtype or got.shape != want.shape:
        return Apart(BY_MORE, float("inf"), 1.0)
    a, b = got.double(), want.double()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    gap = gap.nan_to_num(nan=float("inf"))
    if not bool(gap.any()):
        return Apart(EQUAL, 0.0, 0.0)
    unit, most = step(want), float(within.codes)
    if want.is_floating_point():
        most = within.reach / unit or within.steps
    far, share = float(gap.max()) / unit, float((gap > 0).double().mean())
    return Apart(BY_ONE if far <= most else BY_MORE, far, share, gap.numel())


def step(x: Tensor) -> float:
    """A step of codes, or of a float dtype at the largest value."""
    if not x.is_floating_point():
        return 1.0
    largest = float(x.double().nan_to_num(posinf=0.0, neginf=0.0, nan=0.0).abs().max()) or 1.0
    return torch.finfo(x.dtype).eps * largest
