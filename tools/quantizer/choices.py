"""Numbers that are chosen by the error they cause: clips of activations, margins of the cache.

A range that holds every value seen makes steps wide for the sake of a few, and one that holds only
most of them clips the few. Which costs less is measured, as the mean square of x - x'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvc8.ir.checkpoint.w8a8 import Range

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the range of an activation
MARGINS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5)  # on the reach of a channel of the cache
MOST_ROWS = 1024  # of a text, to measure an error on


def clipped(seen: Range, sample: Tensor) -> Range:
    """The range among `CLIPS` times the one seen with the least error on a sample of values."""
    errors = [_range_error(Range(seen.low * c, seen.high * c), sample) for c in CLIPS]
    best = CLIPS[min(range(len(CLIPS)), key=errors.__getitem__)]
    return Range(seen.low * best, seen.high * best)


def _range_error(seen: Range, x: Tensor) -> float:
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if high == low:
        return 0.0
    scale = (high - low) / 255
    zero = round(-low / scale) - 128
    codes = torch.round(x / scale + zero).clamp(-128, 127)
    return float(((codes - zero) * scale - x).square().mean())


@dataclass
class Sample:
    """Some rows of what comes in several parts, evenly over them."""

    every: int
    rows: list[Tensor] = field(default_factory=list)
    at: int = 0

    def add(self, value: Tensor) -> None:
        """Take values [..., T, C]."""
        flat = value.reshape(-1, value.shape[-1])
        self.rows.append(flat[-self.at % self.every :: self.every].clone())
        self.at += len(flat)

    def values(self) -> Tensor:
        """What was kept, [rows, C]."""
        return torch.cat(self.rows)


@dataclass
class Reach:
    """How far a cache's channels reach, and which margin texts not yet seen would have wanted.

    Each text is measured against what the texts before it reached, so that the margin is chosen on
    values that its ranges do not know (prequential validation; Dawid 1984).
    """

    margins: Sequence[float] = MARGINS
    ends: tuple[Tensor, Tensor] | None = None  # float32 [C]: the least and the largest value
    errors: Tensor | None = None  # float64 [margins, C], summed over rows held back

    def add(self, parts: Iterable[Tensor], count: int, held_back: bool) -> Tensor:
        """Take a text's rows [n, C], part by part, `count` in all.

        `held_back`: their error tells something about the margin. Gives how far all channels reach
        now, float32 [C].
        """
        before = self.top if held_back and self.ends is not None else None
        some = Sample(-(-count // MOST_ROWS))
        for rows in parts:
            low, high = rows.amin(0).float(), rows.amax(0).float()
            if self.ends is not None:
                low, high = low.minimum(self.ends[0]), high.maximum(self.ends[1])
            self.ends = low, high
            if before is not None:
                some.add(rows)
        if before is not None:
            held = some.values()
            found = torch.stack([_cache_error(before * m, held) for m in self.margins])
            self.errors = found if self.errors is None else self.errors + found
        return self.top

    @property
    def top(self) -> Tensor:
        """How far the channels reach from zero, float32 [C], once a text was seen."""
        assert self.ends is not None
        low, high = self.ends
        return low.abs().maximum(high.abs())

    def range(self, margin: float) -> tuple[Tensor, Tensor]:
        """The least and the largest value [C], their distance widened by a margin."""
        assert self.ends is not None
        low, high = self.ends
        wider = (high - low) / 2 * (margin - 1)
        return low - wider, high + wider

    def margin(self, weight: Tensor | None = None, floor: Tensor | None = None) -> Tensor:
        """The margin [C] with the least error, channels weighted, but each at least its `floor`.

        1 where nothing was held back.
        """
        best = 1.0
        if self.errors is not None:
            cost = (self.errors if weight is None else self.errors * weight).sum(1)
            best = self.margins[int(cost.argmin())]
        margin = torch.full_like(self.top, best)
        return margin if floor is None else margin.maximum(floor)


def _cache_error(top: Tensor, rows: Tensor) -> Tensor:
    """The summed squared error of each channel when `top` has the code 127."""
    scale = (top / 127).clamp(min=torch.finfo(torch.float32).tiny)
    found = (rows / scale).round_().clamp_(-128, 127).mul_(scale).sub_(rows)
    return found.square_().sum(0).double()
