"""From a float model's directory to a quantized one: what kvc8-quantize and kvc8.quantize do."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.model_files import listed, place
from kvc8.ir.checkpoint.new_directory import kept_directory, refuse_existing
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.quantizer.calibration_data import Text, encode_texts, read_texts, with_lines
from kvc8.tools.quantizer.engine_form import SERVED, entries_for
from kvc8.tools.quantizer.float_check import check_float_model
from kvc8.tools.quantizer.layers import stages
from kvc8.tools.quantizer.memory import check_budget, give_back
from kvc8.tools.quantizer.model import QuantPlan, not_copied
from kvc8.tools.quantizer.recipe_settings import (
    engine_of,
    kvc8_options,
    run_dtype,
    vendor_options,
)
from kvc8.tools.quantizer.recipes import kvc8, minmax, msmodelslim
from kvc8.tools.quantizer.recipes.kinds_of_text import kinds_of_text
from kvc8.tools.quantizer.recipes.mixtures import choose_experts, experts
from kvc8.tools.quantizer.sensitivity import LinearGroup, measure, roll_back
from kvc8.tools.quantizer.settings import (
    MOST_TOKENS,
    SWEEPS,
    Recipe,
    Settings,
    recipe_of,
    written,
)
from kvc8.tools.quantizer.sites import LinearSite, choose, labels, sites, vocabulary
from kvc8.tools.quantizer.transforms.rotation import untied_bytes
from kvc8.tools.quantizer.work import Report, Texts, Work

Tell = Callable[[str], None]  # a warning or a note, as a line
Progress = Callable[[int], AbstractContextManager[Report]]  # of so many layers


def no_progress(_: int) -> AbstractContextManager[Report]:
    """Nothing is shown."""
    return nullcontext(lambda *_: None)


@dataclass(frozen=True)
class Quantized:
    """What a quantization made: the directory, and what went into it."""

    out: Path
    recipe: Recipe
    plan: QuantPlan  # the tensors that were written
    texts: int
    tokens: int
    groups: tuple[LinearGroup, ...] = ()  # what --rollback measured
    notes: tuple[str, ...] = ()  # what was said of the model on the way

    @property
    def left_float(self) -> int:
        """How many linears are not quantized, lm_head apart."""
        every = sum(len(kind.every) for kind in experts(self.plan.program))
        return len(sites(self.plan.program)) + every - len(self.plan.linears)


def quantize_model(
    source: Path,
    out: Path,
    calibration: Path,
    settings: Settings,
    *,
    resume: bool = False,
    tell: Tell = lambda _: None,
    progress: Progress = no_progress,
) -> Quantized:
    """Quantize a float model's directory by the texts of a file, into the directory `out`.

    `tell` hears each note as it is known. A run that is interrupted leaves what it has done beside
    `out`, and one with `resume` goes on with it. Raises ModelError where the model, the texts or
    the settings are refused, TargetError where `out` exists.
    """
    recipe = recipe_of(settings)
    refuse_existing(out)
    checkpoint = open_checkpoint(source)
    notes = list[str]()

    def note(line: str) -> None:
        notes.append(line)
        tell(line)

    _check_float(checkpoint, note)
    dtype = config_dtype(checkpoint)
    engine = engine_of(settings, source, recipe, dtype)
    read = read_texts(calibration, settings.samples)
    program = capture(checkpoint, run_dtype(settings, checkpoint, recipe))
    texts, more = _tokens(read, source, settings, recipe, vocabulary(program))
    give_back()  # what the tokenizer took
    cut = stages(program)
    check_budget(settings.memory, cut, max(map(len, [*texts, *more])))
    identity = _identity(checkpoint, [*texts, *more])
    check_float_model(checkpoint, program, cut, texts, settings.memory, note)
    give_back()  # and what transformers' own model took
    with (
        kept_directory(out, resume) as (part, state),
        progress((len(cut) - 1) * (SWEEPS[recipe] + (settings.rollback is not None))) as report,
    ):
        if recipe == "kvc8":
            checkpoint = _rotated(settings, checkpoint, program, state, note)
            give_back()
        stored = partial(entries_for, dtype=dtype, engine=engine) if engine else list
        size = settings.part_file_size
        run = Work(checkpoint, program, part.path, state, size, report, stored)
        run.begin({**written(settings, recipe), **identity})
        plan, groups = _make(run, settings, recipe, texts, more)
        plan.finish(part.path, engine)
    if engine and dtype not in SERVED:
        what = f"says {str(dtype).removeprefix('torch.')}, in which no engine computes"
        do = "convert the model to float16 or bfloat16 to serve it"
        note(f"note: {place(source, 'config.json')}: {what}; {do}")
    count = sum(map(len, texts))
    return Quantized(out, recipe, plan, len(texts), count, tuple(groups), tuple(notes))


def _widening(read: Sequence[Text]) -> list[Text]:
    """What only widens the reach of K and V; none where no tokenizer is there to be read."""
    written = any(text.tokens is None for text in read)
    return [*with_lines(read), *kinds_of_text()] if written else []


def _tokens(
    read: Sequence[Text], source: Path, settings: Settings, recipe: Recipe, words: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of the texts, and of those that only widen what is known of K and V.

    Where all texts are tokens no tokenizer is read, and after this none is held.
    """
    most = settings.max_tokens or (None if recipe == "msmodelslim" else MOST_TOKENS)
    tokenizer = cache(partial(read_tokenizer, source))
    encode = partial(
        encode_texts,
        encode=lambda content: tokenizer().encode_any(content),
        most=most,
        vocabulary=words,
    )
    return encode(read), encode(_widening(read)) if recipe == "kvc8" else []


def _check_float(checkpoint: Checkpoint, note: Tell) -> None:
    if checkpoint.layout != "float":
        what = f"is quantized already ({checkpoint.layout})"
        raise ModelError(place(checkpoint.path), what, "name the float model it came from")
    for warning in checkpoint.warnings:
        note(f"warning: {warning}")
    if rest := not_copied(checkpoint):
        note(f"note: {place(checkpoint.path)}: {listed(rest)} is not copied")


def _identity(checkpoint: Checkpoint, texts: Texts) -> Mapping[str, object]:
    """What a run that goes on must find as it was: the model's files and the tokens."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = {"model": [dict(checkpoint.config), stats], "texts": texts}
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
        for name, part in parts.items()
    }


def _rotated(
    settings: Settings, checkpoint: Checkpoint, program: Program, state: Path, note: Tell
) -> Checkpoint:
    """The model that the recipe kvc8 quantizes, of which `program` becomes; says what it is."""
    linears = choose(sites(program), settings.disable, settings.down_proj)
    options = kvc8_options(settings)
    found, left = kvc8.rotated(checkpoint, program, bool(linears), options, state / "rotated")
    if left:
        note(f"note: {place(checkpoint.path)}: {left}, so int8 costs it more")
    if more := untied_bytes(checkpoint, found):
        what = f"its lm_head is rotated apart from the embedding, {more / 1e6:.1f} MB more"
        note(f"note: {place(checkpoint.path)}: {what}")
    return found


def _make(
    run: Work, settings: Settings, recipe: Recipe, texts: Texts, more: Texts
) -> tuple[QuantPlan, list[LinearGroup]]:
    """What is written, and what leaving linears float was chosen by."""
    if recipe == "msmodelslim":
        options = vendor_options(settings, run_dtype(settings, run.checkpoint, recipe))
        return msmodelslim.quantize(run, texts, options), []
    mixed = experts(run.program)
    chosen = choose(sites(run.program), settings.disable, settings.down_proj, mixed)
    mixed = choose_experts(mixed, settings.disable)
    if not chosen and not mixed and not settings.kv_cache:
        raise ModelError("--disable", "leaves nothing to quantize", "name fewer linears")
    name = kvc8.NAME if recipe == "kvc8" else minmax.NAME
    notes = {"recipe": name, "texts": len(texts), "tokens": sum(map(len, texts))}
    if settings.kv_cache:
        notes = {"kv_calibrated": "post-rope", **notes}
    if recipe == "minmax":
        named = labels(chosen, settings.act, settings.dynamic)
        return minmax.quantize(run, texts, chosen, mixed, settings.kv_cache, notes, named), []
    chosen, groups = _rolled_back(run, settings, texts, chosen)
    named, notes = (
        labels(chosen, settings.act, settings.dynamic),
        {**notes, **_of(settings, groups)},
    )
    options_ = kvc8_options(settings)
    return kvc8.quantize(run, texts, chosen, options_, notes, mixed, named, more), groups


def _rolled_back(
    run: Work, settings: Settings, texts: Texts, chosen: list[LinearSite]
) -> tuple[list[LinearSite], list[LinearGroup]]:
    """The linears to quantize when the worst are left float, and what each group of them costs."""
    if settings.rollback is None or not chosen:
        return chosen, []
    groups = roll_back(measure(run, texts, chosen), settings.rollback / 100)
    left = {module for group in groups if group.rolled_back for module in group.modules}
    return [site for site in chosen if site.module not in left], groups


def _of(settings: Settings, groups: list[LinearGroup]) -> Mapping[str, object]:
    """What to note of linears that are left float."""
    if not groups:
        return {}
    left = [module for group in groups if group.rolled_back for module in group.modules]
    errors = {module: group.error for group in groups for module in group.modules}
    return {"rollback_percent": settings.rollback, "rolled_back": left, "sensitivity": errors}
