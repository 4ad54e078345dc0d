"""How far what a device gave is from what the emulation gave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL, BY_ONE, BY_MORE = "equal", "off by one", "off by more"
# A device sums in another order, and attention over int8 pages splits the query into int8 parts:
# so many units in the last place, of the largest value.
UNITS = 8


@dataclass(frozen=True)
class Apart:
    """The worst of an op's results; codes count in steps, floats in units of the largest value."""

    outcome: str
    most: float
    share: float  # of the values that differ at all

    @property
    def figure(self) -> str:
        """In words."""
        if self.outcome == EQUAL:
            return EQUAL
        return f"{self.outcome}: {self.most:.3g} at most, {self.share:.2%} of values"


def apart(got: Sequence[Tensor], want: Sequence[Tensor]) -> Apart:
    """Compare results one by one; dtype and shape are part of them."""
    if len(got) != len(want):
        return Apart(BY_MORE, float("inf"), 1.0)
    found = [_pair(a, b) for a, b in zip(got, want, strict=True)]
    order = (EQUAL, BY_ONE, BY_MORE)
    return max(found, key=lambda x: (order.index(x.outcome), x.most), default=Apart(EQUAL, 0, 0))


def _pair(got: Tensor, want: Tensor) -> Apart:
    if got.dtype is not want.dtype or got.shape != want.shape:
        return Apart(BY_MORE, float("inf"), 1.0)
    a, b = got.double(), want.double()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    gap = gap.nan_to_num(nan=float("inf"))
    if not bool(gap.any()):
        return Apart(EQUAL, 0.0, 0.0)
    unit, most = 1.0, 1.0
    if want.is_floating_point():
        largest = float(b.nan_to_num(posinf=0.0, neginf=0.0, nan=0.0).abs().max()) or 1.0
        unit, most = torch.finfo(want.dtype).eps * largest, UNITS
    far = float(gap.max()) / unit
    return Apart(BY_ONE if far <= most else BY_MORE, far, float((gap > 0).double().mean()))
