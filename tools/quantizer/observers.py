"""msModelSlim's observers of a linear's input: what range they make of what they have seen.

`--act-method` 1 is the mean of each text's least and greatest value; 2 a histogram that is cut
where that lowers the quantization error; 3 the histogram unless the range is over 50 deviations.
The histogram is torch.ao's HistogramObserver of torch 2.0 with its rounding, since its search
stops at the first step that is no better: one bit decides how far it goes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS, COARSE, UPSAMPLE = 2048, 256, 128
STEP = 1e-5  # of all values seen, which a step of the search may leave outside
WIDE = 50  # deviations


@dataclass
class MinMax:
    """The mean over calls of each call's extremes, in the input's own dtype.

    Not the extremes of all calls: msModelSlim's `StatMinMaxObserver` averages them.
    """

    _lows: list[Tensor] = field(default_factory=list)
    _highs: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor) -> None:
        """See the input of one call."""
        self._lows.append(x.min())
        self._highs.append(x.max())

    def range(self) -> tuple[Tensor, Tensor]:
        """The least and greatest value to be kept."""
        return torch.stack(self._lows).mean(), torch.stack(self._highs).mean()


@dataclass
class Histogram:
    """A histogram of all calls, and a search for the ends that lose least."""

    _low: Tensor | None = None
    _high: Tensor | None = None
    _counts: Tensor = field(default_factory=lambda: torch.zeros(BINS))

    def update(self, x: Tensor) -> None:
        """See the input of one call.

        The counts are taken between whole numbers, as histc's arguments were truncated to int, so
        values beyond them are dropped; the bins are used as if they reached the true ends.
        """
        x = x.float()
        low, high = torch.aminmax(x)
        if self._low is None or self._high is None or bool(self._low == self._high):
            self._counts = torch.histc(x, BINS, min=int(low), max=int(high))
            self._low, self._high = low, high
            return
        low, high, coarser, start = _widened(self._low, self._high, low, high)
        counts = torch.histc(x, BINS, min=int(low), max=int(high))
        same = bool(low == self._low) and bool(high == self._high)
        self._counts = counts + (self._counts if same else _spread(self._counts, coarser, start))
        self._low, self._high = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        """The least and greatest value to be kept."""
        assert self._low is not None
        assert self._high is not None
        start, end = self._search((self._high.item() - self._low.item()) / BINS)
        wide = (self._high - self._low) / BINS
        return self._low + wide * start, self._low + wide * (end + 1)

    def _search(self, wide: float) -> tuple[int, int]:
        """The first and last bin to be kept: quantiles are moved in until that does not help.

        cumsum's differences are rounded, so counts may be below zero and sums may fall: each step
        looks from the bin it is at, as a loop would, and not by bisection.
        """
        total = self._counts.sum().item()
        sums = np.asarray(self._counts.cumsum(0).numpy())
        alpha, beta, start, end, best = 0.0, 1.0, 0, BINS - 1, float("inf")
        while alpha < beta:
            low, high = alpha + STEP, beta - STEP
            left = _first(sums[start : end + 1] >= np.float32(low * total), end - start) + start
            right = end - _first(
                sums[start : end + 1][::-1] <= np.float32(high * total), end - start
            )
            if left - start > end - right:
                next_start, next_end, alpha = left, end, low
            else:
                next_start, next_end, beta = start, right, high
            if (next_start, next_end) == (start, end):
                continue
            error = _error(self._counts, wide, next_start, next_end)
            if error > best:
                break
            best, start, end = error, next_start, next_end
        return start, end


def _first(found: NDArray[np.bool_], otherwise: int) -> int:
    at = int(found.argmax())
    return at if found[at] else otherwise


def _widened(
    old_low: Tensor, old_high: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Ends that hold both ranges, how much coarser bins become, and where the old ones begin.

    Only the upper end gives way, so that the bins come out even.
    """
    low, high = torch.min(low, old_low), torch.max(high, old_high)
    fine = (old_high - old_low) / (BINS * UPSAMPLE)
    coarser = int(torch.ceil((high - low) / (BINS * fine)).item())
    high = high + (coarser * (BINS * fine) - (high - low))
    return low, high, coarser, int(torch.round((old_low - low) / fine).item())


def _spread(counts: Tensor, coarser: int, start: int) -> Tensor:
    """Old counts over new bins, `coarser` times as wide as a 128th of an old one."""
    fine = torch.zeros(BINS * coarser)
    fine[start : BINS * UPSAMPLE + start] = counts.repeat_interleave(UPSAMPLE)
    sums = torch.cumsum(fine, 0, dtype=torch.double)[coarser - 1 :: coarser]
    before = torch.zeros(BINS)
    before[1:] = sums[:-1]
    return ((sums - before) / UPSAMPLE).float()


def _error(counts: Tensor, wide: float, start: int, end: int) -> float:
    """The squared error of 256 steps between two bins, were values spread evenly in their bins."""
    step = wide * (end - start + 1) / COARSE
    if step == 0.0:
        return 0.0
    begins = (torch.arange(BINS) - start) * wide
    ends = begins + wide
    first = torch.div(begins, step, rounding_mode="floor").clamp_(0, COARSE - 1)
    last = torch.div(ends, step, rounding_mode="floor").clamp_(0, COARSE - 1)
    density = counts / wide
    half = torch.tensor(step / 2)
    error = torch.zeros(BINS)
    error += _moment(begins - (first + 0.5) * step, torch.ones(BINS) * (step / 2), density)
    error += (last - first - 1) * _moment(-half, half, density)
    # The centers of the first and of the last step are rounded in different ways.
    error += _moment(-half, ends - (last * step + step / 2), density)
    return error.sum().item()


def _moment(begin: Tensor, end: Tensor, density: Tensor) -> Tensor:
    return density * ((end * end * end - begin * begin * begin) / 3)
