"""kvc8-compile: a model directory into a program for the NPU, or an ONNX model.

    kvc8-compile DIR --target npu -o OUT

The directory holds a language model with scales for an int8 KV cache (C8), as kvc8-quantize or
msModelSlim writes it. OUT is written whole or not at all.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.errors import TargetError
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_kv_calibrated, add_options, add_ranks, options_of
from kvc8.tools.driver.request import DTYPES, Target, check_heads, check_request, open_known
from kvc8.tools.reporter.arguments import add_arguments

if TYPE_CHECKING:  # torch and transformers take seconds: imported when nothing is refused at once
    from kvc8.ir.checkpoint.reader import Checkpoint
    from kvc8.ir.program import Program
    from kvc8.passes.options import Options
    from kvc8.passes.pipeline import See
    from kvc8.tools.reporter.heat import Heat
    from kvc8.tools.reporter.steps import PassSteps


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-compile."""
    found = argparse.ArgumentParser(prog="kvc8-compile", description=__doc__.splitlines()[0])
    found.add_argument("directory", type=Path, help="the model, with scales for its KV cache")
    found.add_argument("--target", choices=("npu", "onnx"), required=True)
    found.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    found.add_argument("--soc", default="ascend910b", help="the NPU (Atlas 800I A2: ascend910b)")
    found.add_argument(
        "--block-size", type=int, default=128, help="tokens a block of the cache holds"
    )
    found.add_argument(
        "--flavor",
        choices=("standard", "gqa", "lowered"),
        help="of ONNX: standard ops over pages (default), what ONNX Runtime is fastest at over a "
        "dense cache, or what an NPU would run, each of its ops a function",
    )
    found.add_argument(
        "--dtype",
        choices=DTYPES,
        help="compute in this; if unset config.json's for an NPU, and float32 for ONNX",
    )
    add_options(found)
    add_ranks(found)
    add_kv_calibrated(found)
    found.add_argument(
        "--check",
        action="store_true",
        help="hold the captured program to transformers' own model, and each pass to its numeric "
        "contract, on a recorded prompt; refuse where one differs",
    )
    found.add_argument("--dump", type=Path, metavar="DIR", help="write what each pass did")
    add_arguments(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Compile as the arguments say; gives the exit status."""
    target, options = _target(args), options_of(args)
    check_request(args.output, target, options)  # before a model is opened
    checkpoint = open_known(args.directory, args.kv_calibrated)
    check_heads(checkpoint, options.ranks)
    return _compile(args, checkpoint, target, options)


def _compile(
    args: argparse.Namespace, checkpoint: "Checkpoint", target: Target, options: "Options"
) -> int:
    from kvc8.tools.driver.compiling import compile_model
    from kvc8.tools.reporter.pass_facts import sites_of
    from kvc8.tools.reporter.summary import of_npu, tell

    steps = _steps() if isinstance(args.report, Path) else None
    heats = list["Heat"]()

    def check(checkpoint: "Checkpoint", captured: "Program") -> None:
        heats.extend(_check_passes(args, target, checkpoint, captured))

    compiled = compile_model(
        checkpoint,
        args.output,
        target,
        options,
        check=check if args.check else None,
        watchers=_watchers(args.dump, steps),
    )
    sites = sites_of(compiled.remarks)
    tell(args, compiled, sites)
    if steps:
        from kvc8.tools.reporter.compiled import write_page  # jinja2 is for pages alone

        npu = of_npu(args, compiled, sites) if target.kind == "npu" else None
        write_page(args, compiled.quantized, steps, heats, npu)
    return 0


def _steps() -> "PassSteps":
    from kvc8.tools.reporter.steps import PassSteps

    return PassSteps()


def _target(args: argparse.Namespace) -> Target:
    target = Target(args.target, args.soc, args.block_size, args.flavor, args.dtype)
    for option in ("report", "explain", "json"):
        if getattr(args, option) is True and target.kind != "npu":
            raise TargetError(
                f"--{option}", "is of --target npu", "leave it out, or compile for npu"
            )
    return target


def _watchers(dump: Path | None, steps: "PassSteps | None") -> "Sequence[See]":
    """What is shown each pass that ran: what writes a dump, and what keeps facts for a page."""
    watchers: list[See] = [steps.see] if steps else []
    if dump:
        from kvc8.tools.reporter import pass_dump

        watchers.insert(0, pass_dump.writer(dump))
    return watchers


def _check_passes(
    args: argparse.Namespace, target: Target, checkpoint: "Checkpoint", captured: "Program"
) -> "list[Heat]":
    from kvc8.tools.driver.faithful import check_capture
    from kvc8.tools.reporter.figures import of_passes
    from kvc8.tools.verifier.check_passes import check_passes, watch_values  # all of the emulation

    check_capture(checkpoint, captured)
    values = watch_values(checkpoint, captured) if isinstance(args.report, Path) else None
    see = values.see if values else None
    verdicts = check_passes(checkpoint, captured, options_of(args), see, target.lowered)
    errors = [verdict.error for verdict in verdicts if verdict.error]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(str(other))
        raise errors[0]
    sites = sum(len(verdict.sites) for verdict in verdicts)
    what = (
        "the captured program computes what transformers computes, and "
        f"{len(verdicts)} runs of passes keep their contracts at {sites} sites"
    )
    print(f"checked: {what}", file=sys.stderr)
    return of_passes(verdicts, values.passes) if values else []


def main() -> int:
    """Run kvc8-compile."""
    # A graph is a cycle that lives to the end, and so are modules: looking for garbage takes a
    # tenth of the time.
    gc.disable()
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
