"""The table of `kvc8-verify passes`: each pass's contract, and what it does to the values."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from kvc8.tools.verifier.gaps import CodeGap, Gap
from kvc8.tools.verifier.values import PassValues, Value
from kvc8.tools.verifier.verdicts import Verdict

MOST = 10  # values that are listed
LEGEND = """\
off by/bound: of the site nearest to its bound, without rounding
own dB, dB: the lowest signal-to-noise ratio of a value that the pass rewrote, in the program's own
    dtypes, by the pass alone and from the CAPTURED program on
codes, at end: int8 codes that differ from what they were, and those at -128 or 127
KL, top-1: of the next token, in nats, from the CAPTURED program on"""


def passes_as_json(
    verdicts: Sequence[Verdict], measured: Sequence[PassValues]
) -> list[dict[str, object]]:
    """Each pass and phase, with every site and value."""
    return [{**asdict(v), **asdict(m)} for v, m in zip(verdicts, measured, strict=True)]


def print_passes(verdicts: Sequence[Verdict], measured: Sequence[PassValues]) -> None:
    """A line for each pass and phase, then the values with the largest errors of their own."""
    console = Console(width=136)
    console.print(_passes(verdicts, measured))
    print(LEGEND)
    worst = largest(measured, MOST)
    if worst:
        console.print(_largest(worst))


def largest(measured: Sequence[PassValues], most: int) -> list[tuple[str, Value]]:
    """The values with the largest errors of their own, with the pass; in the program's order."""
    every = [(m.name, v) for m in measured for v in m.values if isinstance(v.own, Gap)]
    ranked = sorted(every, key=lambda each: _own(each[1]), reverse=True)
    chosen = {id(value) for _, value in ranked[:most] if _own(value)}
    return [(name, value) for name, value in every if id(value) in chosen]


def _own(value: Value) -> float:
    return value.own.relative if isinstance(value.own, Gap) else 0.0


def _passes(verdicts: Sequence[Verdict], measured: Sequence[PassValues]) -> Table:
    made = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("pass", "contract"):
        made.add_column(name, no_wrap=True)
    for name in ("sites", "off by/bound", "own dB", "dB", "codes", "at end", "KL", "top-1"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("nearest to its bound", no_wrap=True)
    for verdict, each in zip(verdicts, measured, strict=True):
        made.add_row(verdict.name, verdict.contract, *_figures(verdict, each), _where(verdict))
    return made


def _figures(verdict: Verdict, measured: PassValues) -> list[str]:
    site = verdict.worst
    told = "-" if verdict.refused or site is None else f"{site.figure:.2g}/{site.bound:.2g}"
    gaps = [value.own for value in measured.values if isinstance(value.own, Gap)]
    totals = [value.total for value in measured.values if value.total]
    return [
        str(len(verdict.sites)),
        told,
        *(decibels(min(gap.snr for gap in every)) if every else "-" for every in (gaps, totals)),
        *_codes([value.own for value in measured.values if isinstance(value.own, CodeGap)]),
        f"{max(x.kl for x in measured.logits):.2g}" if measured.logits else "-",
        f"{sum(x.top1 for x in measured.logits)}/{len(measured.logits)}"
        if measured.logits
        else "-",
    ]


def _codes(found: Sequence[CodeGap]) -> tuple[str, str]:
    of = sum(codes.of for codes in found)
    if not of:
        return "-", "-"
    differ, ends = sum(sum(c.by) for c in found), sum(c.saturated * c.of for c in found)
    return f"{differ / of:.2%}" if differ else "0", f"{ends / of:.2%}"


def _where(verdict: Verdict) -> str:
    site = verdict.worst
    if verdict.refused or site is None:
        return "refused by verify" if verdict.refused else "no site: nothing to compare"
    where = f"{site.phase} {site.layer} {site.node}"
    return where if site.holds else f"BREACH {where}"


def _largest(found: Sequence[tuple[str, Value]]) -> Table:
    title = "the largest errors that a pass makes by itself, first in the program first"
    made = Table(title=title, title_justify="left", box=None)
    for name in ("pass", "phase", "layer", "value"):
        made.add_column(name, no_wrap=True)
    for name in ("own, max", "own dB", "dB in all"):
        made.add_column(name, justify="right", no_wrap=True)
    for name, value in found:
        assert isinstance(value.own, Gap)
        total = decibels(value.total.snr) if value.total else "-"
        figures = (f"{value.own.largest:.2g}", decibels(value.own.snr), total)
        made.add_row(name, value.phase, value.layer, value.node, *figures)
    return made


def decibels(snr: float) -> str:
    """A signal-to-noise ratio as a table shows it; "exact" where there is no noise."""
    return "exact" if math.isinf(snr) else f"{snr:.0f}"
