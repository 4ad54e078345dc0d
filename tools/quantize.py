"""kvc8-quantize: a float model to W8A8 with an int8 KV cache.

    kvc8-quantize model_dir -o out --calib-file texts.jsonl --use-kvcache-quant

The options of the vendor's convert_quant_weights.py are taken in its spelling too. Recipes:

    kvc8          the model is rotated so that int8 fits it, ranges are chosen by their error, and
                  K is measured after RoPE; the default
    minmax        ranges are what all texts reach, K is measured after RoPE
    msmodelslim   the vendor's, bit for bit; the default where an option is given that only it
                  has, as --act-method, --anti-method or --disable-level
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.model_files import listed, place
from kvc8.ir.checkpoint.new_directory import refuse_existing
from kvc8.tools.command import INTERRUPTED, entry
from kvc8.tools.driver.request import open_known
from kvc8.tools.quantizer.calibration_data import read_texts
from kvc8.tools.quantizer.options import add_options, settings_of, source_of
from kvc8.tools.quantizer.settings import Settings, recipe_of

if TYPE_CHECKING:  # torch and transformers take seconds: imported when nothing is refused at once
    from kvc8.tools.quantizer.quantizing import Quantized
    from kvc8.tools.quantizer.work import Report


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-quantize."""
    found = argparse.ArgumentParser(
        prog="kvc8-quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Measure and write; gives the exit status."""
    source, settings = source_of(args), settings_of(args)
    _check_request(args, source, settings)
    from kvc8.tools.quantizer.memory import keep_large_apart
    from kvc8.tools.quantizer.quantizing import quantize_model

    keep_large_apart()
    try:
        made = quantize_model(
            source,
            args.output,
            args.calib_file,
            settings,
            resume=args.resume,
            tell=lambda line: print(line, file=sys.stderr),
            progress=_progress,
        )
    except KeyboardInterrupt:
        print(f"{place(args.output)}: interrupted; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    _summarize(made)
    return 0


def _check_request(args: argparse.Namespace, source: Path, settings: Settings) -> None:
    """Refuse what can be refused before torch is imported."""
    recipe_of(settings)
    refuse_existing(args.output)
    open_known(source)
    read_texts(args.calib_file, settings.samples)


def _summarize(made: "Quantized") -> None:
    plan = made.plan
    if made.groups:
        from rich.console import Console

        from kvc8.tools.quantizer.sensitivity import table

        Console(width=100).print(table(made.groups))
    print(
        f"{made.out}: {len(plan.linears)} linears in W8A8, {made.left_float} float, lm_head float"
    )
    if missed := plan.notes.get("experts_not_reached"):
        assert isinstance(missed, list)
        what = f"{len(missed)} experts were reached by no text ({listed(missed)})"
        print(f"{what}; their scales are those of their weights, as every expert's")
    if plan.kv:
        when, layers = "before" if made.recipe == "msmodelslim" else "after", len(plan.kv) // 2
        print(f"K ({when} RoPE) and V of {layers} layers measured on {made.tokens:,} tokens")


@contextmanager
def _progress(total: int) -> "Iterator[Report]":
    """A bar on the terminal, if stderr is one: the layer at work, the speed and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    names = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"))
    columns = (*names, TimeRemainingColumn())
    with Progress(
        *columns, console=console, disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task("quantizing", total=total, speed="")
        start, passed = time.monotonic(), 0

        def report(done: float, where: str, tokens: int) -> None:
            nonlocal passed
            passed += tokens
            said = speed(done, total, passed, time.monotonic() - start)
            bar.update(task, completed=done, description=where, speed=said)

        yield report


def speed(done: float, total: int, tokens: int, seconds: float) -> str:
    """How many layers are done, and how many tokens a second pass one."""
    return f"{int(done)}/{total} layers, {tokens / max(seconds, 1e-3):,.0f} tokens/s a layer"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kvc8-quantize."""
    # A run that is told to end stops as one that is interrupted does, and can be gone on with.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return entry(parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
