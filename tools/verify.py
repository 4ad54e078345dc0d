"""kvc8-verify: one prompt through every form of a compiled model, side by side.

    kvc8-verify DIR

The reference is the QUANTIZED program. All forms are fed the tokens with which it continues the
prompt greedily in float32.

In float64 the reference and ONNX Runtime must agree: in every code, in every greedy token, and in
every logit within 1e-3. There rounding has no say, so a difference is a fault.

In float32 and below no form can promise that. A sum in another order moves a value by one part in
10^7; where that crosses the middle between two codes the code changes by one, and each quantizer
after it amplifies the step, until two correct forms differ as much as quantization itself makes
them differ. How much that is shows where the reference in float64 stands beside the reference in
float32. What must hold there all the same: no code differs whose float inputs are equal bit for
bit ("same inputs"); and while all codes agree, logits agree within 1e-3.

With --passes, each pass is run on recorded inputs and held to its contract: tools/contracts.py.

With --phases one prompt is instead taken whole, in chunks and token by token: tools/phases.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvc8.ir.capture import capture, config_dtype
from kvc8.ir.checkpoint import Checkpoint
from kvc8.ir.new_directory import refuse_existing
from kvc8.ir.program import Program
from kvc8.ir.types import dtype_name
from kvc8.ir.widen import widen
from kvc8.passes import pipeline
from kvc8.tools import dumps, phases
from kvc8.tools.bisection import Bisection
from kvc8.tools.check_passes import Choices, check_passes, table
from kvc8.tools.command import entry
from kvc8.tools.compare import Row, compare
from kvc8.tools.compile import add_kv_calibrated, open_calibrated, quantize
from kvc8.tools.forms import Run, Tokens, generate, in_onnxruntime, one_program, replay
from kvc8.tools.sensitivity import print_costs, sensitivity
from kvc8.tools.tokenize import read_tokenizer

F32, F64 = "reference f32", "reference f64"
ONNX_F64 = "ONNX Runtime f64"
EXACT = (ONNX_F64, *phases.EXACT)  # must agree with what they stand against, whatever the sums
LOGITS = 1e-3
CHOICES = {
    "prefill-kv": ("float", "int8"),
    "fold": ("offsets", "kv"),
    "fuse": ("on", "off"),
    "kv-format": ("nd", "nz"),
}
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


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-verify."""
    found = argparse.ArgumentParser(prog="kvc8-verify", description=__doc__.splitlines()[0])
    found.add_argument("directory", type=Path, help="the model, with scales for its KV cache")
    found.add_argument("--text", type=Path, help="a file whose text is the prompt")
    found.add_argument("--tokens", type=int, default=200, help="of the prompt")
    found.add_argument("--steps", type=int, default=32, help="decode steps after it")
    found.add_argument("--kv-scales", choices=("repair", "as-is"), default="repair")
    add_kv_calibrated(found)
    found.add_argument(
        "--passes", action="store_true", help="instead, hold each pass to its numeric contract"
    )
    found.add_argument(
        "--bisect",
        type=Path,
        metavar="OUT",
        help="with a directory for a repro of the first breach that --passes finds, if any",
    )
    for name, choices in CHOICES.items():
        found.add_argument(f"--{name}", choices=choices, default=choices[0])
    found.add_argument("--phases", action="store_true", help="a prompt whole, in chunks, by tokens")
    found.add_argument(
        "--sensitivity", action="store_true", help="what quantizing K or V of each layer costs"
    )
    found.add_argument("--json", action="store_true", help="print the table as JSON")
    found.add_argument(
        "--dump",
        type=Path,
        metavar="FILE",
        help="written by `kvc8-run --dump`; DIR is what it ran: compare it with the emulation",
    )
    return found


def work(args: argparse.Namespace) -> int:
    """Run all forms and compare; gives 1 where one breaks a promise."""
    if args.dump:
        return dumps.work(args)
    checkpoint = open_calibrated(args.directory, args.kv_calibrated)
    if args.passes or args.bisect:
        return _passes(args, checkpoint)
    text = args.text.read_text(encoding="utf-8") if args.text else TEXT
    prompt = read_tokenizer(args.directory).encode(text)[: args.tokens]
    if args.sensitivity:
        costs = sensitivity(checkpoint, prompt, args.kv_scales)
        print_costs(costs, len(prompt), args.json)
        return 0
    captured = capture(checkpoint, torch.float32)
    reference = captured.copy()
    quantize(reference, args.kv_scales)
    own = capture(checkpoint, config_dtype(checkpoint))
    quantize(own, args.kv_scales)
    tokens = generate(reference, checkpoint, prompt, args.steps)
    if args.phases:
        rows = phases.phase_rows(checkpoint, reference, tokens)
    else:
        rows = _single(checkpoint, captured, reference, own, tokens)
        rows += _double(checkpoint, reference, tokens)
    _print(rows, args.json, tokens)
    broken = [problem for row in rows for problem in broken_promises(row)]
    for problem in broken:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if broken else 0


def _passes(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """The table of contracts; gives 1 where a pass breaks its own."""
    choices = Choices(None, args.kv_scales, args.prefill_kv, args.fold, args.fuse, args.kv_format)
    if args.bisect:
        refuse_existing(args.bisect)
    repro = Bisection(args.bisect, checkpoint.read)
    verdicts = check_passes(checkpoint, choices, repro.see)
    if args.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    else:
        Console(width=120).print(table(verdicts))
    broken = [verdict.sentence for verdict in verdicts if verdict.sentence]
    for problem in broken:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if broken else 0


def _single(
    checkpoint: Checkpoint, captured: Program, reference: Program, own: Program, tokens: Tokens
) -> list[Row]:
    """The forms as they run, each against the reference in float32."""
    base = one_program(reference, checkpoint, tokens)
    same, _ = pipeline.lower_for_npu(reference, "int8", fuse="off")
    device, _ = pipeline.lower_for_npu(own, "float")
    dtype = dtype_name(config_dtype(checkpoint))
    forms: dict[str, Callable[[], Run]] = {
        "float cache f32": lambda: one_program(captured, checkpoint, tokens),
        F64: lambda: one_program(widen(reference), checkpoint, tokens),
        "NPU emulated f32": lambda: replay(same, checkpoint, tokens),
        "ONNX Runtime f32": lambda: in_onnxruntime(reference, checkpoint, tokens),
        f"NPU emulated {dtype}": lambda: replay(device, checkpoint, tokens),
    }
    return [compare(form, run(), F32, base, tokens) for form, run in forms.items()]


def _double(checkpoint: Checkpoint, reference: Program, tokens: Tokens) -> list[Row]:
    """What must agree, whatever the order of sums."""
    wide = widen(reference)
    base, made = (run(wide, checkpoint, tokens) for run in (one_program, in_onnxruntime))
    return [compare(ONNX_F64, made, F64, base, tokens)]


def broken_promises(row: Row) -> list[str]:
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
    if (exact or (agree and row.form.endswith("f32"))) and not row.logits <= LOGITS:
        what = f"logits differ by {row.logits:.2g} from {row.against}, more than {LOGITS}"
        found.append(f"{row.form}: {what}; compile with --dump and compare the programs")
    return found


def _print(rows: list[Row], as_json: bool, tokens: Tokens) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{len(tokens.prompt)} tokens of prompt and {len(tokens.steps)} decode steps")
    for against in dict.fromkeys(row.against for row in rows):
        Console(width=112).print(_table([row for row in rows if row.against == against], against))
    print("NPU rows are emulated as the ops are documented; they were not verified on a device")


def _table(rows: list[Row], against: str) -> Table:
    table = Table(title=f"against {against}", title_justify="left", box=None)
    table.add_column(no_wrap=True, min_width=18)
    for name in ("logits, max", "KL, mean", "greedy", "codes differ", "by at most", "first"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same inputs", justify="right", no_wrap=True)
    for row in rows:
        greedy = f"{row.greedy}/{row.calls}"
        table.add_row(row.form, f"{row.logits:.2g}", f"{row.kl:.2g}", greedy, *_codes(row))
    return table


def _codes(row: Row) -> tuple[str, ...]:
    if row.codes is None:
        return ("float", "", "", "")
    codes = row.codes
    first = "-" if codes.first is None else f"layer {codes.first}"
    share = f"{codes.differ / codes.of:.2%}" if codes.differ else "0"
    same = "" if codes.same_inputs is None else str(codes.same_inputs)
    return (share, str(codes.most), first, same)


def main() -> int:
    """Run kvc8-verify."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
