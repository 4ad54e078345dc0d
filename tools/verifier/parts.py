"""The parts of a verification, from Python: what kvc8.verify and kvc8-verify do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.new_directory import refuse_existing
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.passes.options import Options
from kvc8.tools.driver.compiling import quantize
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.verifier.check_passes import check_passes, watch_values
from kvc8.tools.verifier.compare import FormRow, LeftOut
from kvc8.tools.verifier.contracts import Checked
from kvc8.tools.verifier.form_table import (
    broken_promises,
    double_rows,
    original_row,
    rank_rows,
    single_rows,
)
from kvc8.tools.verifier.forms import Tokens, generate
from kvc8.tools.verifier.phases import phase_rows
from kvc8.tools.verifier.repro import Bisection
from kvc8.tools.verifier.values import PassValues
from kvc8.tools.verifier.verdicts import Verdict

TEXT = """A paged cache keeps the keys and values of each sequence in blocks of a fixed size, and a
table says which blocks belong to which sequence. When a sequence grows past the end of its last
block, the table gets another one from a list of free blocks; when it ends, its blocks go back to
that list. No block has to lie beside another, so memory is never cut into pieces that are too small
to use. What a block holds may be stored in fewer bits than the model computes in. Eight bits a
value halve what sixteen take, and twice as many tokens fit beside the weights, or twice as many
sequences share one card. The price is a rounding of every key and every value to one of 256 steps
of its channel. How much that costs depends on how well the steps fit what the channel holds: a
channel whose largest value was measured before a rotation, and stored after it, is clipped, and the
answers suffer. It is therefore worth asking of every number in a compiled program where it came
from, what it may differ by, and who has checked that it does not differ by more than that."""


@dataclass(frozen=True)
class FormsResult:
    """Forms of a model beside others, and the sentences of the promises that they broke."""

    tokens: Tokens
    rows: Sequence[FormRow | LeftOut]
    problems: Sequence[str]


@dataclass(frozen=True)
class PassesResult:
    """Passes held to their contracts, and what each did to the values."""

    verdicts: Sequence[Verdict]
    values: Sequence[PassValues]

    @property
    def problems(self) -> list[str]:
        """A sentence for each breach."""
        return [verdict.sentence for verdict in self.verdicts if verdict.sentence]


def prompt_of(directory: Path, text: str | None, tokens: int) -> list[int]:
    """The first tokens of a text, or of one that kvc8 has."""
    return read_tokenizer(directory).encode(text or TEXT)[:tokens]


def compare_forms(
    checkpoint: Checkpoint,
    options: Options,
    prompt: Sequence[int],
    steps: int,
    compiled: Sequence[Path] = (),
) -> FormsResult:
    """Every form of a model, and what was compiled of it, beside the reference."""
    captured = capture(checkpoint, torch.float32)
    reference, whole = captured.copy(), replace(options, ranks=1)
    quantize(reference, whole)
    own = capture(checkpoint, config_dtype(checkpoint))
    quantize(own, whole)
    tokens = generate(reference, checkpoint, prompt, steps)
    first, problems = original_row(checkpoint, captured, tokens)
    rows = single_rows(checkpoint, captured, reference, own, tokens, compiled)
    rows += double_rows(checkpoint, reference, tokens)
    if options.ranks > 1:
        rows += rank_rows(checkpoint, reference, tokens, options)
    return _result(tokens, [first, *rows], problems)


def compare_phases(
    checkpoint: Checkpoint, options: Options, prompt: Sequence[int], steps: int
) -> FormsResult:
    """A prompt taken whole, in chunks, and by tokens."""
    reference = capture(checkpoint, torch.float32)
    quantize(reference, replace(options, ranks=1))
    tokens = generate(reference, checkpoint, prompt, steps)
    return _result(tokens, phase_rows(checkpoint, reference, tokens), [])


def _result(
    tokens: Tokens, rows: Sequence[FormRow | LeftOut], problems: Sequence[str]
) -> FormsResult:
    made = [row for row in rows if isinstance(row, FormRow)]
    broken = [problem for row in made for problem in broken_promises(row)]
    return FormsResult(tokens, rows, [*problems, *broken])


def hold_passes(
    checkpoint: Checkpoint, options: Options, bisect: Path | None = None
) -> PassesResult:
    """Each pass held to its contract; `bisect` gets a repro of the first breach, if any."""
    if bisect:
        refuse_existing(bisect)
    captured = capture(checkpoint)
    repro, values = Bisection(bisect, checkpoint.read), watch_values(checkpoint, captured)

    def see(checked: Checked) -> None:
        repro.see(checked)
        values.see(checked)

    verdicts = check_passes(checkpoint, captured, options, see)
    return PassesResult(verdicts, values.passes)
