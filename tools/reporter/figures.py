"""What passes and layers were measured by, as heat along the layers."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from kvc8.tools.reporter.heat import REST, Cell, Heat, heat
from kvc8.tools.verifier.gaps import Gap
from kvc8.tools.verifier.sensitivity import ALL, CacheCost
from kvc8.tools.verifier.values import PassValues, Value
from kvc8.tools.verifier.verdicts import ComparedValue, Verdict

At = TypeVar("At", ComparedValue, Value)
LOGARITHM = "Colored by the logarithm, over three decades."


def of_passes(verdicts: Sequence[Verdict], measured: Sequence[PassValues]) -> list[Heat]:
    """What `kvc8-verify passes` finds, along the layers."""
    return [of_contracts(verdicts), *of_values(measured)]


def of_contracts(verdicts: Iterable[Verdict]) -> Heat:
    """How near each pass comes to its bound in each layer."""
    rows: dict[str, dict[str, Cell]] = {}
    for row, site in _by_row((verdict.name, verdict.sites) for verdict in verdicts):
        cells, layer, cell = rows.setdefault(row, {}), _column(site.layer), _share(site)
        if layer not in cells or cell.figure > cells[layer].figure:
            cells[layer] = cell
    meaning = (
        "The largest difference that a pass makes in a layer, given the same inputs as before it "
        "and without rounding, in percent of the bound that its contract allows: 100 is all of it, "
        "more is a breach; = is equal to the last bit; 0 is less than half a percent."
    )
    return Heat("Contracts: percent of the bound", meaning, rows)


def _share(site: ComparedValue) -> Cell:
    note = f"{site.node}: {site.figure:.3g}, bound {site.bound:.3g}"
    if site.figure == 0:
        return Cell(0, "=", 0, note)
    share = site.figure / site.bound if site.bound else math.inf
    text = "∞" if math.isinf(share) else f"{100 * share:.0f}"
    return Cell(share, text, min(share, 1), note, not site.holds)


def of_values(measured: Iterable[PassValues]) -> list[Heat]:
    """The errors of a pass alone, the codes it alone changes, and the errors that add up."""
    own, codes, total = (dict[str, dict[str, tuple[float, str]]]() for _ in range(3))
    for row, value in _by_row((each.name, each.values) for each in measured):
        if isinstance(value.own, Gap):
            _keep(own, row, value, value.own.relative)
        else:
            _keep(codes, row, value, sum(value.own.by) / value.own.of)
        if value.total:
            _keep(total, row, value, value.total.relative)
    isolated = (
        "The largest error in a layer that a pass makes by itself, on the values that the program "
        "before it had, rounding and all: the root of the mean square, as a part of the value's."
    )
    differ = "The largest share of int8 codes of a value that a pass by itself makes others."
    accumulated = (
        "The same from the captured program on, with all that passes did before it and upstream. A "
        "culprit is hot in both tables, a victim in this one only."
    )
    return [
        heat("Isolated: relative RMS", f"{isolated} {LOGARITHM}", own),
        heat("Isolated: share of codes that differ", f"{differ} {LOGARITHM}", codes),
        heat("Accumulated: relative RMS", f"{accumulated} {LOGARITHM}", total),
    ]


def _keep(
    rows: dict[str, dict[str, tuple[float, str]]], row: str, value: Value, figure: float
) -> None:
    """Keep a figure where it is the largest of its layer; what is no number is infinite."""
    size = math.inf if math.isnan(figure) else figure
    cells, layer = rows.setdefault(row, {}), _column(value.layer)
    if layer not in cells or size > cells[layer][0]:
        stands = f", for {value.stands_for}" if value.stands_for else ""
        cells[layer] = (size, f"{value.node}{stands}: {size:.3g}")


def of_sensitivity(costs: Iterable[CacheCost]) -> Heat:
    """What quantizing K or V of one layer alone costs."""
    rows: dict[str, dict[str, tuple[float, str]]] = {}
    for cost in costs:
        if cost.layer != ALL:
            note = f"KL {cost.kl:.3g}, of 99 % of the tokens at most {cost.kl_p99:.3g}"
            rows.setdefault(cost.cache, {})[_column(cost.layer)] = (cost.kl, note)
    meaning = (
        "Mean KL divergence of the next token, in nats, with only this layer's K or V in int8, "
        f"against a float cache. {LOGARITHM}"
    )
    return heat("Sensitivity: KL of one cache alone", meaning, rows)


def _by_row(passes: Iterable[tuple[str, Sequence[At]]]) -> Iterator[tuple[str, At]]:
    """Each site with the row it stands in: the pass and phase, numbered where they come again."""
    seen: Counter[str] = Counter()
    for name, sites in passes:
        rows = {site.phase: f"{name}, {site.phase}" for site in sites}
        seen.update(rows.values())
        for site in sites:
            row = rows[site.phase]
            yield (row if seen[row] == 1 else f"{row} ({seen[row]})"), site


def _column(layer: str) -> str:
    found = re.fullmatch(r"layer (\d+)", layer)
    return found[1] if found else REST
