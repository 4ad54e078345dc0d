"""kvc8-verify: compare the forms of a model, and hold passes to what they promise.

    kvc8-verify forms DIR [OUT ...]    every form of a model on one prompt, side by side
    kvc8-verify passes DIR             each pass, held to its numeric contract
    kvc8-verify phases DIR             a prompt whole, in chunks, and by tokens
    kvc8-verify sensitivity DIR        what quantizing K or V of each layer costs
    kvc8-verify all DIR [OUT ...]      forms, passes and sensitivity
    kvc8-verify dump OUT FILE          values that a device gave, against the emulation

The first row of the forms is transformers' own model of DIR beside the program captured of it, with
the float weights that DIR stands for: they must compute the same (tools/driver/faithful.py). A form
that cannot be made of a model is left out, and it is said why. What kvc8-compile made of DIR may be
given too, and stands in the table as it is on disk.

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
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvc8.ir.errors import TargetError
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_kv_calibrated, add_options, add_ranks, options_of
from kvc8.tools.driver.request import check_heads, open_known
from kvc8.tools.reporter.arguments import page_path

if TYPE_CHECKING:  # torch and transformers take seconds: imported when nothing is refused at once
    from kvc8.ir.checkpoint.reader import Checkpoint
    from kvc8.tools.reporter.heat import Heat
    from kvc8.tools.verifier.parts import FormsResult


@dataclass(frozen=True)
class PartResult:
    """What one part found: for --json, and the sentences of what is broken."""

    json: object
    broken: Sequence[str]
    heats: "Sequence[Heat]" = ()  # for --report


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-verify."""
    found = argparse.ArgumentParser(
        prog="kvc8-verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = found.add_subparsers(dest="part", metavar="PART", required=True)
    for name in ("forms", "phases", "passes", "sensitivity", "all"):
        part = parts.add_parser(name)
        part.add_argument("directory", type=Path, help="the model, with scales for its KV cache")
        _add_prompt(part, name)
        add_options(part)
        add_ranks(part)
        add_kv_calibrated(part)
        part.add_argument("--json", action="store_true", help="print the table as JSON")
    dump = parts.add_parser("dump")
    dump.add_argument("directory", type=Path, metavar="OUT", help="what the device ran")
    dump.add_argument("dump", type=Path, metavar="FILE", help="written by `kvc8-run --dump`")
    dump.add_argument("--json", action="store_true", help="print the differences as JSON")
    return found


def _add_prompt(part: argparse.ArgumentParser, name: str) -> None:
    """What is asked of, and where what is found goes."""
    add = part.add_argument
    if name in ("forms", "all"):
        what = "what kvc8-compile made of it"
        add("compiled", type=Path, nargs="*", metavar="OUT", help=what)
    if name != "passes":
        add("--text", type=Path, help="a file whose text is the prompt")
        add("--tokens", type=int, default=200, help="of the prompt")
    if name in ("forms", "phases", "all"):
        add("--steps", type=int, default=32, help="decode steps after it")
    if name in ("passes", "all"):
        what = "with a directory for a repro of the first breach, if any"
        add("--bisect", type=Path, metavar="OUT", help=what)
    if name in ("passes", "sensitivity", "all"):
        what = "write a page of what each pass does, with the figures along the layers"
        add("--report", type=page_path, metavar="R.html", help=what)


def work(args: argparse.Namespace) -> int:
    """Run what is asked for and print it; gives 1 where something breaks a promise."""
    if args.part == "dump":
        from kvc8.tools.verifier import dumps

        return dumps.work(args)
    _check_directory(args.directory)
    checkpoint = open_known(args.directory, args.kv_calibrated)
    check_heads(checkpoint, options_of(args).ranks)
    names = ("forms", "passes", "sensitivity") if args.part == "all" else (args.part,)
    found = {name: PARTS[name](args, checkpoint) for name in names}
    if args.json:
        every = {name: part.json for name, part in found.items()}
        print(json.dumps(every if args.part == "all" else every[args.part], indent=1))
    broken = [problem for part in found.values() for problem in part.broken]
    for problem in broken:
        print(f"error: {problem}", file=sys.stderr)
    if getattr(args, "report", None):
        from kvc8.tools.reporter.verified import write_page

        write_page(args, checkpoint, [heat for part in found.values() for heat in part.heats])
    return 1 if broken else 0


def _check_directory(directory: Path) -> None:
    if directory.is_dir() and (directory / "manifest.json").exists():
        what = "is a compiled model, which does not say what it should compute"
        raise TargetError(
            str(directory), what, "name the model that it was compiled from, and then this"
        )


def _forms(args: argparse.Namespace, checkpoint: "Checkpoint") -> PartResult:
    from kvc8.tools.verifier.parts import compare_forms

    options, prompt = options_of(args), _prompt(args)
    return _told(args, compare_forms(checkpoint, options, prompt, args.steps, args.compiled))


def _phases(args: argparse.Namespace, checkpoint: "Checkpoint") -> PartResult:
    from kvc8.tools.verifier.parts import compare_phases

    return _told(args, compare_phases(checkpoint, options_of(args), _prompt(args), args.steps))


def _told(args: argparse.Namespace, found: "FormsResult") -> PartResult:
    if not args.json:
        from kvc8.tools.verifier.form_table import print_rows

        print_rows(found.rows, found.tokens)
    return PartResult([asdict(row) for row in found.rows], found.problems)


def _passes(args: argparse.Namespace, checkpoint: "Checkpoint") -> PartResult:
    from kvc8.tools.reporter.figures import of_passes
    from kvc8.tools.verifier.parts import hold_passes
    from kvc8.tools.verifier.pass_table import passes_as_json, print_passes

    found = hold_passes(checkpoint, options_of(args), args.bisect)
    verdicts, values = found.verdicts, found.values
    if not args.json:
        print_passes(verdicts, values)
    heats = of_passes(verdicts, values)
    return PartResult(passes_as_json(verdicts, values), found.problems, heats)


def _sensitivity(args: argparse.Namespace, checkpoint: "Checkpoint") -> PartResult:
    from kvc8.tools.reporter.figures import of_sensitivity
    from kvc8.tools.verifier.sensitivity import print_costs, sensitivity

    prompt = _prompt(args)
    costs = sensitivity(checkpoint, prompt, options_of(args))
    if not args.json:
        print_costs(costs, len(prompt))
    return PartResult([asdict(cost) for cost in costs], [], [of_sensitivity(costs)])


def _prompt(args: argparse.Namespace) -> list[int]:
    from kvc8.tools.verifier.parts import prompt_of

    text = args.text.read_text(encoding="utf-8") if args.text else None
    return prompt_of(args.directory, text, args.tokens)


PARTS: Mapping[str, Callable[[argparse.Namespace, "Checkpoint"], PartResult]] = MappingProxyType(
    {"forms": _forms, "phases": _phases, "passes": _passes, "sensitivity": _sensitivity}
)


def main() -> int:
    """Run kvc8-verify."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
