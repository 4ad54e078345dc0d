"""Every pass that a compile runs, held to its contract: the table of kvc8-verify --passes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.table import Table

from kvc8.ir.capture import capture
from kvc8.ir.checkpoint import Checkpoint
from kvc8.passes import pipeline
from kvc8.passes.rewrite import Step
from kvc8.tools.contracts import Call, Checked, Verdict, check
from kvc8.tools.recording import Parameters, empty, feed, record

Phases = dict[str, tuple[tuple[Step, ...], tuple[Step, ...]]]
PROMPT, CHUNK = 13, 3  # tokens: more than a window of the tests, less than a block


@dataclass(frozen=True)
class Choices:
    """What decides which passes run; see kvc8-compile."""

    dtype: torch.dtype | None = None
    kv_scales: str = "repair"
    prefill_kv: str = "float"
    fold: str = "offsets"
    fuse: str = "on"
    kv_format: str = "nd"
    npu: bool = True  # or stop at QUANTIZED, where ONNX does

    @property
    def quantize(self) -> tuple[Step, ...]:
        """The passes up to QUANTIZED."""
        return pipeline.QUANTIZE if self.kv_scales == "repair" else pipeline.AS_IS

    @property
    def phases(self) -> Phases:
        """The passes of each phase after that."""
        return (
            pipeline.phases(self.prefill_kv, self.fold, self.fuse, self.kv_format)
            if self.npu
            else {}
        )


def check_passes(
    checkpoint: Checkpoint,
    choices: Choices,
    see: Callable[[Checked], None] = lambda checked: None,
) -> list[Verdict]:
    """Run a prompt and a decode step before and after each pass of a compile."""
    return check_steps(checkpoint, choices.quantize, choices.phases, choices.dtype, see)


def check_steps(
    checkpoint: Checkpoint,
    quantize: tuple[Step, ...],
    phases: Phases,
    dtype: torch.dtype | None = None,
    see: Callable[[Checked], None] = lambda checked: None,
) -> list[Verdict]:
    """The same for any passes: those up to QUANTIZED, and those of each phase after it."""
    program, parameters = capture(checkpoint, dtype), Parameters(checkpoint.read)
    vocabulary = int(str(checkpoint.config["vocab_size"]))
    tokens = [(5 + 37 * i) % vocabulary for i in range(PROMPT + CHUNK)]
    prompt, chunk = feed(tokens[:PROMPT]), feed(tokens[PROMPT:], PROMPT)
    step = feed(tokens[-1:], PROMPT)
    found = check(program, quantize, [Call(prompt), Call(step)], parameters, see)
    if found and found[-1].refused:
        return found
    state = record(program, parameters, prompt.inputs(program), empty(program)).caches
    calls = {"prefill": Call(prompt), "chunk": Call(chunk, state), "decode": Call(step, state)}
    for phase, (shared, own) in phases.items():
        found += check(program.copy(), (*shared, *own), [calls[phase]], parameters, see)
        if found[-1].refused:
            return found
    return found


def table(verdicts: Iterable[Verdict]) -> Table:
    """A line for each pass and phase."""
    made = Table(box=None)
    for name in ("pass", "contract"):
        made.add_column(name, no_wrap=True)
    for name in ("sites", "difference", "bound", "rounding", "logits"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("nearest to its bound", no_wrap=True)
    for verdict in verdicts:
        made.add_row(verdict.name, verdict.contract, *_figures(verdict))
    return made


def _figures(verdict: Verdict) -> list[str]:
    site = verdict.worst
    if verdict.refused or site is None:
        where = "refused by verify" if verdict.refused else "no site: nothing to compare"
        return [str(len(verdict.sites)), "-", "-", "-", "-", where]
    rounding = max(s.rounding for s in verdict.sites)
    figures = (site.figure, site.bound, rounding, verdict.logits)
    where = f"{site.phase}, {site.layer}, {site.node}"
    told = where if site.holds else f"BREACH {where}"
    return [str(len(verdict.sites)), *(f"{figure:.2g}" for figure in figures), told]
