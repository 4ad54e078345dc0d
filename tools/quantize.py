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
import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvc8.ir.capture.trace import capture, config_dtype
from kvc8.ir.checkpoint.model_files import listed, place
from kvc8.ir.checkpoint.new_directory import kept_directory, refuse_existing
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program
from kvc8.tools.command import INTERRUPTED, entry
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.quantizer.calibration_data import encode_texts, read_texts, with_lines
from kvc8.tools.quantizer.engine_form import SERVED, entries_for
from kvc8.tools.quantizer.float_check import check_float_model
from kvc8.tools.quantizer.layers import stages
from kvc8.tools.quantizer.memory import room
from kvc8.tools.quantizer.model import QuantPlan, not_copied
from kvc8.tools.quantizer.options import (
    MOST_TOKENS,
    SWEEPS,
    add_options,
    engine_of,
    kvc8_options,
    recipe_of,
    run_dtype,
    settings_of,
    source_of,
    vendor_options,
)
from kvc8.tools.quantizer.recipes import kvc8, minmax, msmodelslim
from kvc8.tools.quantizer.recipes.mixtures import choose_experts, experts
from kvc8.tools.quantizer.sensitivity import measure, roll_back, table
from kvc8.tools.quantizer.sites import LinearSite, choose, labels, sites, vocabulary
from kvc8.tools.quantizer.transforms.rotation import untied_bytes
from kvc8.tools.quantizer.work import Report, Texts, Work


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
    source, recipe = source_of(args), recipe_of(args)
    refuse_existing(args.output)
    checkpoint = open_checkpoint(source)
    _check_float(checkpoint)
    dtype = config_dtype(checkpoint)
    engine = engine_of(args, recipe, dtype)
    read = read_texts(args.calib_file, args.samples)
    program = capture(checkpoint, run_dtype(args, checkpoint, recipe))
    most = args.max_tokens or (None if recipe == "msmodelslim" else MOST_TOKENS)
    tokenizer = cache(partial(read_tokenizer, source))  # where all texts are tokens there is none
    tokens = partial(
        encode_texts,
        encode=lambda content: tokenizer().encode_any(content),
        most=most,
        vocabulary=vocabulary(program),
    )
    texts, more = tokens(read), tokens(with_lines(read)) if recipe == "kvc8" else []
    cut = stages(program)
    identity = _identity(checkpoint, [*texts, *more])
    space = room(args.memory, cut, max(map(len, [*texts, *more])))
    check_float_model(checkpoint, program, cut, texts, args.memory)
    try:
        with (
            kept_directory(args.output, args.resume) as (part, state),
            _progress((len(cut) - 1) * (SWEEPS[recipe] + (args.rollback is not None))) as report,
        ):
            if recipe == "kvc8":
                checkpoint, program = _rotated(args, checkpoint, program, state)
            stored = partial(entries_for, dtype=dtype, engine=engine) if engine else list
            run = Work(
                checkpoint, program, part.path, state, args.part_file_size, space, report, stored
            )
            run.begin({**settings_of(args, recipe), **identity})
            plan = _make(run, args, recipe, texts, more)
            plan.finish(part.path, engine)
    except KeyboardInterrupt:
        print(f"{place(args.output)}: interrupted; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    _summarize(args, plan, recipe, texts)
    if engine and dtype not in SERVED:
        what = f"says {str(dtype).removeprefix('torch.')}, in which no engine computes"
        do = "convert the model to float16 or bfloat16 to serve it"
        print(f"note: {place(source, 'config.json')}: {what}; {do}", file=sys.stderr)
    return 0


def _rotated(
    args: argparse.Namespace, checkpoint: Checkpoint, program: Program, state: Path
) -> tuple[Checkpoint, Program]:
    """The model that the recipe kvc8 quantizes, and its program; says what that is."""
    linears = choose(sites(program), args.disable, args.down_proj)
    found = kvc8.rotated(checkpoint, bool(linears), kvc8_options(args), state / "rotated")
    if isinstance(found, str):
        what = f"is not rotated ({found}), so int8 costs it more"
        print(f"note: {place(checkpoint.path)}: {what}", file=sys.stderr)
        return checkpoint, program
    if more := untied_bytes(checkpoint, found):
        what = f"its lm_head is rotated apart from the embedding, {more / 1e6:.1f} MB more"
        print(f"note: {place(checkpoint.path)}: {what}", file=sys.stderr)
    if found.config == checkpoint.config:  # its tensors have the names and shapes they had
        return found, program
    return found, capture(found, torch.float32)


def _make(run: Work, args: argparse.Namespace, recipe: str, texts: Texts, more: Texts) -> QuantPlan:
    if recipe == "msmodelslim":
        options = vendor_options(args, run_dtype(args, run.checkpoint, recipe))
        return msmodelslim.quantize(run, texts, options)
    mixed = experts(run.program)
    chosen = choose(sites(run.program), args.disable, args.down_proj, mixed)
    mixed = choose_experts(mixed, args.disable)
    if not chosen and not mixed and not args.use_kvcache_quant:
        raise ModelError("--disable", "leaves nothing to quantize", "name fewer linears")
    name = kvc8.NAME if recipe == "kvc8" else minmax.NAME
    notes = {"recipe": name, "texts": len(texts), "tokens": sum(map(len, texts))}
    if args.use_kvcache_quant:
        notes = {"kv_calibrated": "post-rope", **notes}
    if recipe == "kvc8":
        chosen, rolled_back = _rolled_back(run, args, texts, chosen)
        named, notes = labels(chosen, args.act, args.dynamic), {**notes, **rolled_back}
        return kvc8.quantize(run, texts, chosen, kvc8_options(args), notes, mixed, named, more)
    named = labels(chosen, args.act, args.dynamic)
    return minmax.quantize(run, texts, chosen, mixed, args.use_kvcache_quant, notes, named)


def _rolled_back(
    run: Work, args: argparse.Namespace, texts: Texts, chosen: list[LinearSite]
) -> tuple[list[LinearSite], Mapping[str, object]]:
    """The linears to quantize when the worst are left float, and what to note of that."""
    if args.rollback is None or not chosen:
        return chosen, {}
    groups = roll_back(measure(run, texts, chosen), args.rollback / 100)
    Console(width=100).print(table(groups))
    left = [module for group in groups if group.rolled_back for module in group.modules]
    errors = {module: group.error for group in groups for module in group.modules}
    notes = {"rollback_percent": args.rollback, "rolled_back": left, "sensitivity": errors}
    return [site for site in chosen if site.module not in left], notes


def _summarize(args: argparse.Namespace, plan: QuantPlan, recipe: str, texts: Texts) -> None:
    every = sum(len(kind.every) for kind in experts(plan.program))
    left = len(sites(plan.program)) + every - len(plan.linears)
    print(f"{args.output}: {len(plan.linears)} linears in W8A8, {left} float, lm_head float")
    if missed := plan.notes.get("experts_not_reached"):
        assert isinstance(missed, list)
        what = f"{len(missed)} experts were reached by no text ({listed(missed)})"
        print(f"{what}; their scales are those of their weights, as every expert's")
    if plan.kv:
        when = "before" if recipe == "msmodelslim" else "after"
        layers, tokens = len(plan.kv) // 2, sum(map(len, texts))
        print(f"K ({when} RoPE) and V of {layers} layers measured on {tokens:,} tokens")


def _check_float(checkpoint: Checkpoint) -> None:
    if checkpoint.layout != "float":
        what = f"is quantized already ({checkpoint.layout})"
        raise ModelError(place(checkpoint.path), what, "name the float model it came from")
    for warning in checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if rest := not_copied(checkpoint):
        print(f"note: {place(checkpoint.path)}: {listed(rest)} is not copied", file=sys.stderr)


def _identity(checkpoint: Checkpoint, texts: Texts) -> Mapping[str, object]:
    """What a run that goes on must find as it was: the model's files and the tokens."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = {"model": [dict(checkpoint.config), stats], "texts": texts}
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
        for name, part in parts.items()
    }


@contextmanager
def _progress(total: int) -> Iterator[Report]:
    """A bar on the terminal, if stderr is one, with the layer at work and the time left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task("quantizing", total=total)
        yield lambda done, where: bar.update(task, completed=done, description=where)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kvc8-quantize."""
    # A run that is told to end stops as one that is interrupted does, and can be gone on with.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return entry(parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
