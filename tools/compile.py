"""kvc8-compile: a model directory into a program for the NPU, or an ONNX model.

    kvc8-compile DIR --target npu -o OUT

The directory holds a language model with scales for an int8 KV cache (C8), as kvc8-quantize or
msModelSlim writes it. OUT is written whole or not at all.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvc8.backends.npu import artifact
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program
from kvc8.passes.pipeline import See
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_kv_calibrated, add_options, add_ranks, options_of
from kvc8.tools.driver.compiling import (
    DTYPES,
    Compiled,
    Target,
    check_request,
    compile_model,
    open_calibrated,
)
from kvc8.tools.reporter import costs, pass_dump
from kvc8.tools.reporter.compiled import write_page
from kvc8.tools.reporter.heat import Heat
from kvc8.tools.reporter.pass_facts import Sites, sites_of
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
        choices=tuple(DTYPES),
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
    costs.add_arguments(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Compile as the arguments say; gives the exit status."""
    target, options = _target(args), options_of(args)
    check_request(args.output, target, options)  # before a model is opened
    checkpoint = open_calibrated(args.directory, args.kv_calibrated)
    steps, heats = PassSteps(), list[Heat]()

    def check(checkpoint: Checkpoint, captured: Program) -> None:
        heats.extend(_check_passes(args, target, checkpoint, captured))

    compiled = compile_model(
        checkpoint,
        args.output,
        target,
        options,
        check=check if args.check else None,
        watchers=_watchers(args, steps),
    )
    sites = sites_of(compiled.remarks)
    _tell(args, compiled, sites)
    if isinstance(args.report, Path):
        npu = _of_npu(args, compiled, sites) if target.kind == "npu" else None
        write_page(args, compiled.quantized, steps, heats, npu)
    return 0


def _target(args: argparse.Namespace) -> Target:
    dtype = DTYPES[args.dtype] if args.dtype else None
    target = Target(args.target, args.soc, args.block_size, args.flavor, dtype)
    for option in ("report", "explain", "json"):
        if getattr(args, option) is True and target.kind != "npu":
            raise TargetError(
                f"--{option}", "is of --target npu", "leave it out, or compile for npu"
            )
    return target


def _watchers(args: argparse.Namespace, steps: PassSteps) -> Sequence[See]:
    """What is shown each pass that ran: what writes a dump, and what keeps facts for a page."""
    watchers = [pass_dump.writer(args.dump)] if args.dump else []
    return [*watchers, steps.see] if isinstance(args.report, Path) else watchers


def _check_passes(
    args: argparse.Namespace, target: Target, checkpoint: Checkpoint, captured: Program
) -> list[Heat]:
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


def _tell(args: argparse.Namespace, compiled: Compiled, sites: Sites) -> None:
    if args.json:
        print(json.dumps(_as_json(args, compiled, sites), indent=1))
        return
    _tell_sites(compiled, sites)
    if args.explain:
        print(*costs.explain_lines(_explained(args, compiled, sites)), sep="\n")
    if args.report is True:
        print(*costs.report_lines(_report(args, compiled)), sep="\n")


def _report(args: argparse.Namespace, compiled: Compiled) -> costs.Report:
    work, device = costs.workload(args), costs.device(args)
    return costs.report(compiled.phases, compiled.unfused(), work, device)


def _explained(args: argparse.Namespace, compiled: Compiled, sites: Sites) -> costs.Explained:
    return costs.explained(compiled.phases, sites, args.soc, args.block_size)


def _of_npu(
    args: argparse.Namespace, compiled: Compiled, sites: Sites
) -> tuple[costs.Report, costs.Explained]:
    return _report(args, compiled), _explained(args, compiled, sites)


def _as_json(args: argparse.Namespace, compiled: Compiled, sites: Sites) -> dict[str, object]:
    layout, used = compiled.layout, artifact.disk_use(compiled.out)
    passes = [{"pass": n, "sites": count, "why": why} for (n, why), count in sites.items()]
    return {
        "output": str(compiled.out),
        "bytes": used.extra,
        "linked_bytes": used.weights,
        "kv_bytes_a_token": layout.bytes_per_token,
        "float16_kv_bytes_a_token": layout.float16_bytes_per_token,
        "passes": passes,
        "report": asdict(_report(args, compiled)),
        "explain": _explained(args, compiled, sites).as_json(),
    }


def _tell_sites(compiled: Compiled, sites: Sites) -> None:
    for (name, why), count in sites.items():
        counted = f"{count} site{'s' * (count != 1)}"
        print(f"{name}: {counted} {f'left alone: {why}' if why else 'rewritten'}")
    layout = compiled.layout
    ratio = layout.bytes_per_token / layout.float16_bytes_per_token
    print(f"KV cache: {layout.bytes_per_token:,} bytes a token, {ratio:.2f}x of float16")
    if compiled.target.kind == "npu":
        used = artifact.disk_use(compiled.out)
        links = f"{used.weights / 1e6:,.1f} MB of linked weights"
        print(f"{compiled.out}: {used.extra / 1e6:.2f} MB beside {links}")


def main() -> int:
    """Run kvc8-compile."""
    # A graph is a cycle that lives to the end: looking for garbage takes a tenth of the time.
    gc.disable()
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
