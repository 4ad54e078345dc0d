"""Draw where a model loses: its KL divergence by position, and by the layer that it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvc8.ir.checkpoint.model_files import place, shown
from kvc8.ir.errors import ModelError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AROUND = 16  # positions that each point is the mean of; single ones are too noisy to read


def smoothed(by_position: Tensor) -> Tensor:
    """The mean of `AROUND` positions up to each, float64 [T]; of as many as there are before it."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), by_position.double().cumsum(0)])
    ends = torch.arange(1, len(sums))
    starts = (ends - AROUND).clamp(min=0)
    return (sums[ends] - sums[starts]) / (ends - starts)


@dataclass(frozen=True)
class Curve:
    """A model's divergence, in nats: by position, float64 [T], and by each cache alone."""

    name: str
    by_position: Tensor
    by_cache: Sequence[tuple[str, float]] = ()  # "K" or "V", layer by layer; empty if unknown


def draw(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Write a picture of each model's divergence, with a second part where layers are known.

    Raises ModelError where matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # an extra, and it takes a second to import
    except ImportError as error:
        what = "cannot be drawn without matplotlib"
        raise ModelError("--plot", what, "pip install 'kvc8[plot]'") from error
    layered = [curve for curve in curves if curve.by_cache]
    figure = Figure(figsize=(9, 8.5 if layered else 4.5), layout="constrained")
    parts = figure.subplots(2 if layered else 1, squeeze=False)[:, 0]
    _positions(parts[0], curves)
    parts[0].set_title(f"{title}; mean of {AROUND} positions", fontsize=10)
    if layered:
        _layers(parts[1], layered)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: no such format
        why = shown(error)
        raise ModelError(place(path), f"cannot be written ({why})", "name a .png file") from error


def _positions(axes: "Axes", curves: Sequence[Curve]) -> None:
    for curve in curves:
        at = range(1, len(curve.by_position) + 1)
        axes.plot(at, smoothed(curve.by_position), label=curve.name, linewidth=1.2)
    axes.set(xlabel="position in the window, tokens", ylabel="KL(float || model), nats")
    _finish(axes)


def _layers(axes: "Axes", curves: Sequence[Curve]) -> None:
    """A model's K and V have one color, and are told apart by their marks."""
    for index, curve in enumerate(curves):
        for side, mark in (("K", "o-"), ("V", "x:")):
            found = [kl for name, kl in curve.by_cache if name == side]
            color = f"C{index}"
            axes.plot(range(len(found)), found, mark, c=color, ms=4, label=f"{curve.name}: {side}")
    axes.set(xlabel="layer", ylabel="KL(float cache || one int8 cache), nats")
    _finish(axes)


def _finish(axes: "Axes") -> None:
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
