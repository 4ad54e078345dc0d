"""kvc8-verify: one prompt through every form of a compiled model, side by side.

    kvc8-verify DIR [OUT ...]

What kvc8-compile made of DIR may be given too, and stands in the table as it is on disk.

The first row is transformers' own model of DIR beside the program captured of it, with the float
weights that DIR stands for: they must compute the same (tools/driver/faithful.py). A form that
cannot be made of a model is left out, and it is said why.

For all other rows the reference is the QUANTIZED program. All forms are fed the tokens with which
it continues the prompt greedily in float32.

In float64 the reference and ONNX Runtime must agree: in every code, in every greedy token, and in
every logit within 1e-3. There rounding has no say, so a difference is a fault.

In float32 and below no form can promise that. A sum in another order moves a value by one part in
10^7; where that crosses the middle between two codes the code changes by one, and each quantizer
after it amplifies the step, until two correct forms differ as much as quantization itself makes
them differ. How much that is shows where the reference in float64 stands beside the reference in
float32. What must hold there all the same: no code differs whose float inputs are equal bit for
bit ("same inputs"); and while all codes agree, logits agree within 1e-3.

Other parts, instead or, with --all, besides:

    --passes        each pass, run on recorded inputs and held to its contract:
                    tools/verifier/contracts.py
    --sensitivity   what quantizing K or V of each layer costs alone: tools/verifier/sensitivity.py
    --phases        one prompt whole, in chunks and token by token: tools/verifier/phases.py
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kvc8.ir.capture.trace import capture, config_dtype
from kvc8.ir.checkpoint.new_directory import refuse_existing
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import TargetError
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_kv_calibrated, add_options, add_ranks, options_of
from kvc8.tools.driver.compiling import open_calibrated, quantize
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.reporter.costs import page_path
from kvc8.tools.reporter.figures import of_passes, of_sensitivity
from kvc8.tools.reporter.heat import Heat
from kvc8.tools.reporter.verified import write_page
from kvc8.tools.verifier import dumps
from kvc8.tools.verifier.bisection import Bisection
from kvc8.tools.verifier.check_passes import check_passes, watch_values
from kvc8.tools.verifier.compare import FormRow, LeftOut
from kvc8.tools.verifier.contracts import Checked
from kvc8.tools.verifier.form_table import (
    broken_promises,
    double_rows,
    original_row,
    print_rows,
    single_rows,
)
from kvc8.tools.verifier.forms import Tokens, generate
from kvc8.tools.verifier.pass_table import passes_as_json, print_passes
from kvc8.tools.verifier.phases import phase_rows
from kvc8.tools.verifier.sensitivity import print_costs, sensitivity

PARTS = {
    "passes": "hold each pass to its numeric contract",
    "sensitivity": "tell what quantizing K or V of each layer costs",
    "phases": "take a prompt whole, in chunks and by tokens",
    "all": "all forms, all passes and the sensitivity of the layers",
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
    found.add_argument(
        "compiled", type=Path, nargs="*", metavar="OUT", help="what kvc8-compile made of it"
    )
    found.add_argument("--text", type=Path, help="a file whose text is the prompt")
    found.add_argument("--tokens", type=int, default=200, help="of the prompt")
    found.add_argument("--steps", type=int, default=32, help="decode steps after it")
    add_options(found)
    add_ranks(found)
    add_kv_calibrated(found)
    _add_parts(found.add_mutually_exclusive_group())
    found.add_argument(
        "--bisect",
        type=Path,
        metavar="OUT",
        help="with a directory for a repro of the first breach that --passes finds, if any",
    )
    found.add_argument("--json", action="store_true", help="print the table as JSON")
    found.add_argument(
        "--report",
        type=page_path,
        metavar="R.html",
        help="write a page of what each pass does, with the figures of --passes (default), "
        "--sensitivity or --all along the layers",
    )
    found.add_argument(
        "--dump",
        "--device-dump",
        type=Path,
        metavar="FILE",
        help="written by `kvc8-run --dump`; DIR is what it ran: compare it with the emulation",
    )
    return found


def _add_parts(to: argparse._MutuallyExclusiveGroup) -> None:
    for name, what in PARTS.items():
        to.add_argument(f"--{name}", action="store_true", help=f"instead, {what}")


@dataclass(frozen=True)
class PartResult:
    """What one part found: for --json, and the sentences of what is broken."""

    json: object
    broken: list[str]
    heats: Sequence[Heat] = ()  # for --report


def work(args: argparse.Namespace) -> int:
    """Run what is asked for and print it; gives 1 where something breaks a promise."""
    if args.dump:
        return dumps.work(args)
    _check_directory(args.directory)
    checkpoint = open_calibrated(args.directory, args.kv_calibrated)
    found = {part.__name__: part(args, checkpoint) for part in _parts(args)}
    if args.json:
        every = {name.strip("_"): part.json for name, part in found.items()}
        print(json.dumps(every if args.all else next(iter(every.values())), indent=1))
    broken = [problem for part in found.values() for problem in part.broken]
    for problem in broken:
        print(f"error: {problem}", file=sys.stderr)
    if args.report:
        write_page(args, checkpoint, [heat for part in found.values() for heat in part.heats])
    return 1 if broken else 0


def _check_directory(directory: Path) -> None:
    if directory.is_dir() and (directory / "manifest.json").exists():
        what = "is a compiled model, which does not say what it should compute"
        raise TargetError(
            str(directory), what, "name the model that it was compiled from, and then this"
        )


def _parts(
    args: argparse.Namespace,
) -> list[Callable[[argparse.Namespace, Checkpoint], PartResult]]:
    if args.all:
        return [_forms, _passes, _sensitivity]
    if args.passes or args.bisect or (args.report and not (args.sensitivity or args.phases)):
        return [_passes]
    if args.sensitivity:
        return [_sensitivity]
    return [_phases if args.phases else _forms]


def _forms(args: argparse.Namespace, checkpoint: Checkpoint) -> PartResult:
    """Every form of the model beside the reference."""
    captured = capture(checkpoint, torch.float32)
    reference = captured.copy()
    quantize(reference, options_of(args))
    own = capture(checkpoint, config_dtype(checkpoint))
    quantize(own, options_of(args))
    tokens = generate(reference, checkpoint, _prompt(args), args.steps)
    first, problem = original_row(checkpoint, captured, tokens)
    rows = single_rows(checkpoint, captured, reference, own, tokens, args.compiled)
    found = _rows(args, [first, *rows, *double_rows(checkpoint, reference, tokens)], tokens)
    return replace(found, broken=[*problem, *found.broken])


def _phases(args: argparse.Namespace, checkpoint: Checkpoint) -> PartResult:
    """A prompt taken whole, in chunks, and by tokens."""
    reference = capture(checkpoint, torch.float32)
    quantize(reference, options_of(args))
    tokens = generate(reference, checkpoint, _prompt(args), args.steps)
    return _rows(args, phase_rows(checkpoint, reference, tokens), tokens)


def _rows(
    args: argparse.Namespace, rows: Sequence[FormRow | LeftOut], tokens: Tokens
) -> PartResult:
    if not args.json:
        print_rows(rows, tokens)
    made = [row for row in rows if isinstance(row, FormRow)]
    broken = [problem for row in made for problem in broken_promises(row)]
    return PartResult([asdict(row) for row in rows], broken)


def _passes(args: argparse.Namespace, checkpoint: Checkpoint) -> PartResult:
    """Each pass held to its contract."""
    if args.bisect:
        refuse_existing(args.bisect)
    captured = capture(checkpoint)
    repro, values = Bisection(args.bisect, checkpoint.read), watch_values(checkpoint, captured)

    def see(checked: Checked) -> None:
        repro.see(checked)
        values.see(checked)

    verdicts = check_passes(checkpoint, captured, options_of(args), see)
    if not args.json:
        print_passes(verdicts, values.passes)
    broken = [verdict.sentence for verdict in verdicts if verdict.sentence]
    heats = of_passes(verdicts, values.passes)
    return PartResult(passes_as_json(verdicts, values.passes), broken, heats)


def _sensitivity(args: argparse.Namespace, checkpoint: Checkpoint) -> PartResult:
    """What quantizing the K or the V of one layer costs."""
    prompt = _prompt(args)
    costs = sensitivity(checkpoint, prompt, options_of(args))
    if not args.json:
        print_costs(costs, len(prompt))
    return PartResult([asdict(cost) for cost in costs], [], [of_sensitivity(costs)])


def _prompt(args: argparse.Namespace) -> list[int]:
    text = args.text.read_text(encoding="utf-8") if args.text else TEXT
    return read_tokenizer(args.directory).encode(text)[: args.tokens]


def main() -> int:
    """Run kvc8-verify."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
