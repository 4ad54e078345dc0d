"""Figures along the layers, as a table whose cells are the darker the larger the figure.

Whoever measured something per layer makes a `Heat` of it; the page draws them all alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

REST = "rest"  # the column of what lies outside of the layers
DECADES = 3  # smaller figures are all as cold


@dataclass(frozen=True)
class Cell:
    """A figure of one layer; `note` names where in the layer it is from."""

    figure: float
    text: str
    heat: float  # from 0 to 1
    note: str = ""
    breach: bool = False


@dataclass(frozen=True)
class Heat:
    """Rows of cells by layer; where a row has no cell for a layer, nothing was compared."""

    title: str
    meaning: str  # a sentence: what a figure is, its unit, and what the colors stand for
    rows: Mapping[str, Mapping[str, Cell]]

    @property
    def columns(self) -> list[str]:
        """The layers of the hot rows, in their order, and what lies outside of them last."""
        names = dict.fromkeys(layer for row in self.hot.values() for layer in row)
        return sorted(names, key=lambda name: (not name.isdecimal(), name.zfill(9)))

    @property
    def hot(self) -> dict[str, Mapping[str, Cell]]:
        """The rows in which something differs."""
        return {n: row for n, row in self.rows.items() if any(c.figure for c in row.values())}

    @property
    def cold(self) -> list[str]:
        """The names of the others."""
        return [name for name in self.rows if name not in self.hot]


def heat(
    title: str,
    meaning: str,
    figures: Mapping[str, Mapping[str, tuple[float, str]]],
) -> Heat:
    """Figures with notes by row and layer, colored by the logarithm over DECADES up to the most."""
    found = [f for row in figures.values() for f, _ in row.values() if 0 < f < math.inf]
    low, high = (math.log10(f) for f in (min(found, default=1), max(found, default=1)))
    low = max(low, high - DECADES)
    rows = {
        name: {
            layer: Cell(figure, _number(figure), _log(figure, low, high), note)
            for layer, (figure, note) in row.items()
        }
        for name, row in figures.items()
    }
    return Heat(title, meaning, rows)


def _log(figure: float, low: float, high: float) -> float:
    if figure == 0:
        return 0.0
    if not math.isfinite(figure):
        return 1.0
    return 0.1 + 0.9 * max(0.0, math.log10(figure) - low) / (high - low) if high > low else 1.0


def _number(figure: float) -> str:
    return "0" if figure == 0 else f"{figure:.0e}".replace("e-0", "e-").replace("e+0", "e+")
