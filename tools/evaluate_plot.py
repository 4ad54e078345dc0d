"""Draw where in a window a model loses: its KL divergence by position."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.errors import ModelError
from kvc8.ir.model_files import place, shown

AROUND = 16  # positions that each point is the mean of; single ones are too noisy to read


def smoothed(by_position: Tensor) -> Tensor:
    """The mean of `AROUND` positions up to each, float64 [T]; of as many as there are before it."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), by_position.double().cumsum(0)])
    ends = torch.arange(1, len(sums))
    starts = (ends - AROUND).clamp(min=0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(path: Path, title: str, curves: Sequence[tuple[str, Tensor]]) -> None:
    """Write a picture of each model's divergence by position, float64 [T] each.

    Raises ModelError where matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # an extra, and it takes a second to import
    except ImportError as error:
        what = "cannot be drawn without matplotlib"
        raise ModelError(f"--plot: {what}; pip install 'kvc8[plot]'") from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, by_position in curves:
        axes.plot(range(1, len(by_position) + 1), smoothed(by_position), label=name, linewidth=1.2)
    axes.set(xlabel="position in the window, tokens", ylabel="KL(float || model), nats")
    axes.set_yscale("log")
    axes.set_title(f"{title}; mean of {AROUND} positions", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: no such format
        why = shown(error)
        raise ModelError(f"{place(path)}: cannot be written ({why}); name a .png file") from error
