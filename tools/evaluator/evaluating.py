"""Run the float model and each form of it on a text, and print how they differ."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.passes.options import Options
from kvc8.tools.evaluator.divergence import Figures
from kvc8.tools.evaluator.forms import Form, Setup, open_float, open_form, with_scales
from kvc8.tools.evaluator.plot import Curve, draw
from kvc8.tools.evaluator.windows import windows_of
from kvc8.tools.quantizer.engines import ENGINES, Engine

# The KL of each layer's K and V alone, on a window, by name.
ByCache = Callable[[Checkpoint, list[int], Options], list[tuple[str, float]]]
NEAR = 1024  # tokens; figures by position are of the first so many, then of twice as many ...
EMULATED = "NPU and engine rows are emulated as documented; they were not verified on a device"


def evaluate(args: argparse.Namespace, by_cache: ByCache) -> int:
    """Evaluate and print; gives the exit status."""
    windows = windows_of(args.text, args.against, args.windows, args.window)
    base = open_float(args.against, args.window)
    passes = Options(kv_scales=args.kv_scales, kv_scales_by=args.kv_scales_by)
    setup = Setup(_dtype(args.dtype), passes, args.float_cache, args.kv_calibrated)
    setups = [_served(setup, args, engine) for engine in args.engine or ["kvc8"]]
    forms = [open_form(path, setup, args.window) for path in args.out for setup in setups]
    with _progress(len(windows) * (1 + len(forms))) as step:
        figures = _evaluate(base, forms, windows, step)
    tokens = sum(len(window) - 1 for window in windows)
    if args.plot:
        title = f"against {base.name}, {len(windows)} windows"
        draw(args.plot, title, _curves(args, setup, windows[0], figures[1:], by_cache))
    if args.json:
        print(json.dumps(_as_json(args, base, forms, figures, tokens), indent=1))
        return 0
    _print(base, forms, figures, tokens)
    if args.window > NEAR:
        _print_by_position(forms, figures, args.window)
    return 0


def _dtype(name: str) -> torch.dtype | None:
    """What model directories compute in; None where config.json decides."""
    return {"config": None, "float32": torch.float32, "float16": torch.float16}[name]


def _served(setup: Setup, args: argparse.Namespace, engine: Engine | Literal["kvc8"]) -> Setup:
    """The same model, in an engine."""
    if engine not in ENGINES:
        return setup
    alone = {
        "--float-cache": args.float_cache,
        "--plot": args.plot,
        "--kv-scales-by token": args.kv_scales_by == "token",
    }
    for name, given in alone.items():
        if given:
            raise ModelError(name, f"is not for --as {engine}", "leave one of the two out")
    return replace(setup, engine=engine, prompt=args.prompt, chunk=args.chunk)


def _curves(
    args: argparse.Namespace,
    setup: Setup,
    window: list[int],
    figures: Sequence[Figures],
    by_cache: ByCache,
) -> list[Curve]:
    """What --plot draws: each OUT by position, and model directories by cache too."""
    curves = []
    for path, seen in zip(args.out, figures, strict=True):
        checkpoint = with_scales(path, setup)
        each = by_cache(checkpoint, window, setup.passes) if checkpoint else []
        curves.append(Curve(str(path), seen.kl_by_position, each))
    return curves


@torch.no_grad()
def _evaluate(
    base: Form, forms: Sequence[Form], windows: Sequence[list[int]], step: Callable[[str], None]
) -> list[Figures]:
    """The figures of the float model and of each form. One window's logits are held at a time."""
    figures = [Figures() for _ in (base, *forms)]
    for window in windows:
        tokens = torch.tensor(window)
        step(base.name)
        reference = base.logits(window)
        figures[0].add_alone(reference, tokens)
        for form, seen in zip(forms, figures[1:], strict=True):
            step(form.name)
            logits = form.logits(window)
            _check_width(form, base, logits.shape[1], reference.shape[1])
            seen.add(logits, reference, tokens)
    return figures


def _check_width(form: Form, base: Form, ours: int, theirs: int) -> None:
    if ours != theirs:
        what = f"gives logits for {ours} tokens and {base.name} for {theirs}"
        raise ModelError(form.name, what, "name the float model that it was made from")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal, if stderr is one."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, advance=1, description=Path(name).name)


def _as_json(
    args: argparse.Namespace,
    base: Form,
    forms: Sequence[Form],
    figures: Sequence[Figures],
    tokens: int,
) -> dict[str, object]:
    rows = [
        {
            "model": form.name,
            "kind": form.kind,
            "perplexity": seen.perplexity,
            "perplexity_change": seen.perplexity / figures[0].perplexity - 1,
            "kl_mean": seen.kl_mean,
            "kl_p99": seen.kl_p99,
            "top1_agreement": seen.top1,
            "by_position": _by_position(figures[0], seen, args.window),
        }
        for form, seen in zip(forms, figures[1:], strict=True)
    ]
    text = {"text": str(args.text), "windows": args.windows, "window": args.window}
    reference = {"model": base.name, "perplexity": figures[0].perplexity}
    return {**text, "tokens": tokens, "float": reference, "models": rows}


def spans(window: int) -> list[tuple[int, int]]:
    """Where a window is cut for figures by position: at `NEAR` tokens, twice as many, and so on."""
    starts = [0]
    while (at := max(2 * starts[-1], NEAR)) < window - 1:  # the last token has no successor
        starts.append(at)
    return list(pairwise([*starts, window]))


def _by_position(base: Figures, seen: Figures, window: int) -> list[dict[str, float]]:
    found = []
    for start, stop in spans(window):
        part, own = seen.between(start, stop), base.between(start, stop).perplexity
        change = part.perplexity / own - 1
        found.append(
            {"start": start, "stop": stop, "kl_mean": part.kl_mean, "perplexity_change": change}
        )
    return found


def _print_by_position(forms: Sequence[Form], figures: Sequence[Figures], window: int) -> None:
    table = Table(title="KL, mean, and change of perplexity by position", title_justify="left")
    table.add_column("")
    for start, stop in spans(window):
        table.add_column(f"{start:,} to {stop:,}", justify="right")
    for form, seen in zip(forms, figures[1:], strict=True):
        parts = _by_position(figures[0], seen, window)
        cells = [f"{part['kl_mean']:.5f} {part['perplexity_change']:+.2%}" for part in parts]
        table.add_row(Path(form.name).name, *cells)
    Console(width=110).print(table)


def _print(base: Form, forms: Sequence[Form], figures: Sequence[Figures], tokens: int) -> None:
    title = f"against {base.name} in float32 on {tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    for name in ("", "run as"):
        table.add_column(name)
    for name in ("perplexity", "change", "KL, mean", "KL, 99 %", "same top token"):
        table.add_column(name, justify="right")
    own = figures[0].perplexity
    table.add_row(Path(base.name).name, "float", f"{own:.3f}", "", "", "", "")
    for form, seen in zip(forms, figures[1:], strict=True):
        change = f"{seen.perplexity / own - 1:+.2%}"
        kl = (f"{seen.kl_mean:.5f}", f"{seen.kl_p99:.4f}")
        row = (Path(form.name).name, form.kind, f"{seen.perplexity:.3f}", change, *kl)
        table.add_row(*row, f"{seen.top1:.2%}")
    Console(width=110).print(table)
    if any(not form.kind.startswith(("reference", "float", "ONNX")) for form in forms):
        print(EMULATED)
