"""The table of `kvc8-verify forms`: each form of a model beside another fed the same tokens.

Which promises a form makes, and why float32 can make so few, stands in tools/verify.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import KVC8Error
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program
from kvc8.ir.types import dtype_name
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.driver.faithful import hold
from kvc8.tools.verifier import phases
from kvc8.tools.verifier.compare import FormRow, LeftOut, compare, compare_or_leave_out
from kvc8.tools.verifier.compiled_forms import has_offsets, in_gqa, of_compiled, scales_by
from kvc8.tools.verifier.forms import Run, Tokens, in_onnxruntime, one_program, replay
from kvc8.tools.verifier.pass_table import decibels
from kvc8.tools.verifier.rank_forms import in_ranks

F32, F64 = "reference f32", "reference f64"
ONNX_F64 = "ONNX Runtime f64"
RANKS_F64 = "all ranks f64"
EXACT = (
    ONNX_F64,
    RANKS_F64,
    *phases.EXACT,
)  # must agree with what they stand against, whatever the sums
LOGITS = 1e-3
WIDTH, CODES = 80, 54  # characters of a line, and what a row of codes takes beside its name
LEAST = 0.001  # of a share in percent
STEPS = 4  # that are compared with transformers' own model


def original_row(
    checkpoint: Checkpoint, captured: Program, tokens: Tokens
) -> tuple[FormRow | LeftOut, list[str]]:
    """The model of transformers beside the captured program, and what is wrong if any is."""
    form, steps = "transformers f64", tokens.steps[:STEPS]
    try:
        held = hold(checkpoint, captured, [*tokens.prompt, *steps], len(steps))
    except KVC8Error as error:
        return LeftOut(form, str(error)), []
    run = partial(Run, caches={})
    made, base = (run(list(logits.split(1))) for logits in (held.theirs, held.ours))
    row = compare(form, made, "float cache f64", base, tokens)
    return row, [str(held.problem)] if held.problem else []


def single_rows(
    checkpoint: Checkpoint,
    captured: Program,
    reference: Program,
    own: Program,
    tokens: Tokens,
    compiled: Sequence[Path] = (),
) -> list[FormRow | LeftOut]:
    """The forms as they run, and what was compiled of them, against the reference in float32."""
    base = one_program(reference, checkpoint, tokens)
    by = scales_by(reference)
    same = Options(kv_scales_by=by, prefill_kv="int8", fuse="off")
    # As kvc8-compile makes it: in the model's dtype, and a prompt sees its own float K and V.
    dtype = dtype_name(config_dtype(checkpoint))
    on_device = f"NPU emulated {dtype}" + (", float prompt" if dtype == "f32" else "")
    forms: dict[str, Callable[[], Run]] = {
        "float cache f32": lambda: one_program(captured, checkpoint, tokens),
        F64: lambda: one_program(widen(reference), checkpoint, tokens),
        "NPU emulated f32": lambda: _on_npu(reference, same, checkpoint, tokens),
        "ONNX Runtime f32": lambda: in_onnxruntime(reference, checkpoint, tokens),
        on_device: lambda: _on_npu(own, Options(kv_scales_by=by), checkpoint, tokens),
    }
    if not has_offsets(reference):  # which GroupQueryAttention has not
        forms["ONNX Runtime gqa"] = lambda: in_gqa(reference, checkpoint, tokens)
    made = [compare_or_leave_out(form, run, F32, base, tokens) for form, run in forms.items()]
    asked = [compare(str(out), of_compiled(out, tokens), F32, base, tokens) for out in compiled]
    return [*made, *asked]


def _on_npu(program: Program, options: Options, checkpoint: Checkpoint, tokens: Tokens) -> Run:
    lowered, _ = pipeline.lower_for_npu(program, options)
    return replay(lowered, checkpoint, tokens)


def rank_rows(
    checkpoint: Checkpoint, reference: Program, tokens: Tokens, options: Options
) -> list[FormRow]:
    """A model divided among ranks against the whole one, from which it may differ if it says so."""
    base = one_program(widen(reference), checkpoint, tokens)
    made, exact = in_ranks(reference, checkpoint, tokens, options)
    form = RANKS_F64 if exact else f"all ranks, sums in {options.sums}"
    return [compare(form, made, F64, base, tokens)]


def double_rows(
    checkpoint: Checkpoint, reference: Program, tokens: Tokens
) -> list[FormRow | LeftOut]:
    """What must agree, whatever the order of sums."""
    wide = widen(reference)
    base, onnx = one_program(wide, checkpoint, tokens), partial(in_onnxruntime, wide, checkpoint)
    return [compare_or_leave_out(ONNX_F64, partial(onnx, tokens), F64, base, tokens)]


def broken_promises(row: FormRow) -> list[str]:
    """What a form promised and did not keep, one sentence each."""
    found = []
    if row.codes and row.codes.same_inputs:
        what = f"{row.codes.same_inputs} int8 codes differ though their inputs are equal"
        found.append(f"{row.form}: {what}; report it with the output of --json")
    exact = row.form in EXACT
    if exact and row.codes and row.codes.differ:
        what = f"{row.codes.differ} of {row.codes.of} int8 codes differ from {row.against}"
        found.append(f"{row.form}: {what}; report it with the output of --json")
    if exact and row.greedy < row.calls:
        what = f"{row.calls - row.greedy} greedy tokens differ from {row.against}"
        found.append(f"{row.form}: {what}; report it with the output of --json")
    agree = row.codes is not None and row.codes.differ == 0
    if (exact or (agree and row.form.endswith("f32"))) and not row.logits.largest <= LOGITS:
        what = f"logits differ by {row.logits.largest:.2g} from {row.against}, more than {LOGITS}"
        found.append(f"{row.form}: {what}; compile with --dump and compare the programs")
    return found


def print_rows(found: Sequence[FormRow | LeftOut], tokens: Tokens) -> None:
    """A table for each form that others stand against, and a line for each that is left out."""
    print(f"{len(tokens.prompt)} tokens of prompt and {len(tokens.steps)} decode steps")
    rows = [row for row in found if isinstance(row, FormRow)]
    wide = max(len(row.form) for row in rows)  # a directory's name may be longer than any form's
    console = Console(width=max(WIDTH, wide + CODES))
    for against in dict.fromkeys(row.against for row in rows):
        group = [row for row in rows if row.against == against]
        console.print(_logits_table(group, against))
        if any(row.codes for row in group):
            console.print(_codes_table(group))
    for left in found:
        if isinstance(left, LeftOut):
            print(f"{left.form} is left out: {left.left_out}")
    print("NPU rows are emulated as documented; they were not verified on a device")


def _logits_table(rows: Sequence[FormRow], against: str) -> Table:
    table = _empty(("logits, max", "dB", "KL, mean", "greedy"), f"against {against}")
    for row in rows:
        noise, greedy = decibels(row.logits.snr), f"{row.greedy}/{row.calls}"
        table.add_row(row.form, f"{row.logits.largest:.2g}", noise, f"{row.kl:.2g}", greedy)
    return table


def _codes_table(rows: Sequence[FormRow]) -> Table:
    of_ends = ("at\nmost", "at\nend", "first\nin", "same\ninputs")
    table = _empty(("codes\ndiffer", "by 1, by 2,\nby more", *of_ends), None)
    for row in rows:
        table.add_row(row.form, *_codes(row))
    return table


def _empty(names: Sequence[str], title: str | None) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, min_width=18)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _codes(row: FormRow) -> tuple[str, ...]:
    if row.codes is None:
        return ("float", *[""] * 5)
    codes = row.codes
    first = "-" if codes.first is None else f"layer {codes.first}"
    by = " ".join(_share(count, codes.of) for count in codes.by) if codes.differ else ""
    same = "" if codes.same_inputs is None else str(codes.same_inputs)
    ends = _percent(codes.saturated)
    return (_share(codes.differ, codes.of), by, str(codes.most), ends, first, same)


def _share(count: int, of: int) -> str:
    return _percent(count / of) if count else "0"


def _percent(share: float) -> str:
    """A share with a digit; "0" is none, and what would be rounded to nothing says so."""
    if not share:
        return "0"
    return f"{share:.1%}" if share >= LEAST else f"<{LEAST:.1%}"
