"""kvc8-compile: a model directory into a program for the NPU, or an ONNX model.

    kvc8-compile DIR --target npu -o OUT

The directory holds a language model with scales for an int8 KV cache (C8), as kvc8-quantize or
msModelSlim writes it. OUT is written whole or not at all.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kvc8.backends.npu import artifact, legality
from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir.capture.trace import capture, config_dtype
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, open_checkpoint
from kvc8.ir.errors import IRError, ModelError, TargetError
from kvc8.ir.expression import Read
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.rewrite import Remark
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_options, options_of
from kvc8.tools.reporter import costs, pass_dump
from kvc8.tools.reporter.compiled import write_page
from kvc8.tools.reporter.heat import Heat
from kvc8.tools.reporter.pass_facts import reason
from kvc8.tools.reporter.steps import Steps

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Told = list[tuple[str, Remark]]


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
    add_kv_calibrated(found)
    found.add_argument(
        "--check",
        action="store_true",
        help="hold each pass to its numeric contract on a recorded prompt; refuse where one breaks",
    )
    found.add_argument("--dump", type=Path, metavar="DIR", help="write what each pass did")
    costs.add_arguments(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Compile as the arguments say; gives the exit status."""
    _check_options(args)
    checkpoint = open_calibrated(args.directory, args.kv_calibrated)
    for warning in (*checkpoint.warnings, *unsupported(checkpoint)):
        warnings.warn(warning, stacklevel=2)
    for_cpu = args.target == "onnx" and args.flavor != "lowered"
    unset = torch.float32 if for_cpu else None  # which a CPU computes fastest
    dtype = DTYPES[args.dtype] if args.dtype else unset
    heats = _check_passes(args, checkpoint, dtype) if args.check else []
    program = capture(checkpoint, dtype)
    steps = Steps()
    see = _watchers(args, steps)
    told = quantize(program, options_of(args), see, checkpoint.read)
    if args.target == "onnx":
        told += _onnx(args, checkpoint, program, see)
        _tell(args, sites_of(told), program)
    else:
        lowered, more = _npu(args, checkpoint, program, see)
        told += more
        _tell_all(args, sites_of(told), program, lowered)
    if isinstance(args.report, Path):
        npu = None if args.target == "onnx" else _of_npu(args, sites_of(told), program, lowered)
        write_page(args, program, steps, heats, npu)
    return 0


def _watchers(args: argparse.Namespace, steps: Steps) -> pipeline.See | None:
    """What is shown each pass that ran: what writes a dump, and what keeps facts for a page."""
    watching = [pass_dump.writer(args.dump)] if args.dump else []
    watching += [steps.see] if isinstance(args.report, Path) else []

    def see(ran: pipeline.Ran) -> None:
        for watcher in watching:
            watcher(ran)

    return see if watching else None


def _check_options(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise TargetError(f"{args.output}: exists already; choose another directory or remove it")
    if args.flavor and args.target != "onnx":
        raise TargetError("--flavor: is of --target onnx; leave it out, or compile for onnx")
    if args.kv_format == "nz" and args.target != "npu":
        raise TargetError("--kv-format: nz is of --target npu; leave it out, or compile for npu")
    for option in ("report", "explain", "json"):
        if getattr(args, option) is True and args.target != "npu":
            raise TargetError(f"--{option}: is of --target npu; leave it out, or compile for npu")


def _check_passes(
    args: argparse.Namespace, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> list[Heat]:
    from kvc8.tools.reporter.figures import of_passes  # these take all of the emulation
    from kvc8.tools.verifier.check_passes import check_passes, watch_values

    on_npu = args.target == "npu" or args.flavor == "lowered"
    values = watch_values(checkpoint, dtype) if isinstance(args.report, Path) else None
    see = values.see if values else None
    verdicts = check_passes(checkpoint, options_of(args), dtype, see, on_npu)
    first, *others = [v.sentence for v in verdicts if v.sentence] or [""]
    if first:
        error = IRError(first)
        for other in others:
            error.add_note(other)
        raise error
    sites = sum(len(verdict.sites) for verdict in verdicts)
    what = f"{len(verdicts)} runs of passes keep their contracts at {sites} sites"
    print(f"checked: {what}", file=sys.stderr)
    return of_passes(verdicts, values.passes) if values else []


def add_kv_calibrated(to: argparse.ArgumentParser) -> None:
    """Add the argument of `open_calibrated`."""
    to.add_argument(
        "--kv-calibrated",
        choices=("pre-rope", "post-rope"),
        help="where K was measured; what the directory's layout implies if unset",
    )


def open_calibrated(directory: Path, calibrated: Calibrated | None) -> Checkpoint:
    """Open a model directory, of which someone may know better where its K was measured."""
    checkpoint = open_checkpoint(directory)
    if calibrated and not checkpoint.kv:
        what = "holds no KV scales for --kv-calibrated to speak of"
        raise ModelError(f"{directory}: {what}; leave it out, or quantize with kvc8-quantize")
    return replace(checkpoint, kv_calibrated=calibrated) if calibrated else checkpoint


def unsupported(checkpoint: Checkpoint) -> list[str]:
    """What the vendor does not support and kvc8 compiles all the same."""
    found = []
    if checkpoint.kv and config_dtype(checkpoint) is torch.bfloat16:
        what = "a bfloat16 model with an int8 KV cache, which the vendor does not support"
        found.append(f"config.json: {what}; compare its answers, or convert it to float16")
    return found


def quantize(
    program: Program,
    options: Options = pipeline.DEFAULT,
    see: pipeline.See | None = None,
    read: Read | None = None,
) -> Told:
    """Bring a captured program to QUANTIZED; with `read`, of stored tensors, remarks say more."""
    passes = pipeline.quantize_passes(options)
    passes = pipeline.reading(passes, read) if read else passes
    return pipeline.run(program, passes, see)


def _npu(
    args: argparse.Namespace, checkpoint: Checkpoint, program: Program, see: pipeline.See | None
) -> tuple[dict[str, Program], Told]:
    options = options_of(args)
    lowered, told = pipeline.lower_for_npu(program, options, see)
    for phase in lowered.values():
        legality.check(phase, args.soc, args.block_size)
    target = artifact.Target(args.soc, args.block_size, asdict(options))
    artifact.write(args.output, checkpoint, lowered, target)
    return lowered, told


def _onnx(
    args: argparse.Namespace, checkpoint: Checkpoint, program: Program, see: pipeline.See | None
) -> Told:
    from kvc8.backends.onnx import emitter, lowered  # onnx takes a second to import

    if args.flavor != "lowered":
        emitter.emit(program, checkpoint, args.output, args.flavor or "standard")
        return []
    phases, told = pipeline.lower_for_npu(program, options_of(args), see)
    lowered.emit_lowered(phases, checkpoint, args.output)
    return told


def sites_of(told: Told) -> Counter[tuple[str, str]]:
    """Sites by pass and why they were left alone."""
    return Counter((name, reason(remark)) for name, remark in told)


def _tell_all(
    args: argparse.Namespace,
    sites: Counter[tuple[str, str]],
    program: Program,
    lowered: dict[str, Program],
) -> None:
    if args.json:
        print(json.dumps(_as_json(args, sites, program, lowered), indent=1))
        return
    _tell(args, sites, program)
    if args.explain:
        print(*costs.explain_lines(lowered, sites, args.soc, args.block_size), sep="\n")
    if args.report is True:
        print(*costs.report_lines(_report(args, program, lowered)), sep="\n")


def _report(
    args: argparse.Namespace, program: Program, lowered: dict[str, Program]
) -> costs.Report:
    unfused, _ = pipeline.lower_for_npu(program, replace(options_of(args), fuse="off"))
    return costs.report(lowered, unfused, costs.workload(args), costs.device(args))


def _of_npu(
    args: argparse.Namespace,
    sites: Counter[tuple[str, str]],
    program: Program,
    lowered: dict[str, Program],
) -> tuple[costs.Report, costs.Report]:
    explained = costs.explained(lowered, sites, args.soc, args.block_size)
    return _report(args, program, lowered), explained


def _as_json(
    args: argparse.Namespace,
    sites: Counter[tuple[str, str]],
    program: Program,
    lowered: dict[str, Program],
) -> dict[str, object]:
    layout, used = kv_layout(program), artifact.disk_use(args.output)
    passes = [{"pass": n, "sites": count, "why": why} for (n, why), count in sites.items()]
    return {
        "output": str(args.output),
        "bytes": used.extra,
        "linked_bytes": used.weights,
        "kv_bytes_a_token": layout.bytes_per_token,
        "float16_kv_bytes_a_token": layout.float16_bytes_per_token,
        "passes": passes,
        "report": _report(args, program, lowered),
        "explain": costs.explained(lowered, sites, args.soc, args.block_size),
    }


def _tell(args: argparse.Namespace, sites: Counter[tuple[str, str]], program: Program) -> None:
    for (name, why), count in sites.items():
        counted = f"{count} site{'s' * (count != 1)}"
        print(f"{name}: {counted} {f'left alone: {why}' if why else 'rewritten'}")
    layout = kv_layout(program)
    ratio = layout.bytes_per_token / layout.float16_bytes_per_token
    size = f"{layout.bytes_per_token:,} bytes a token, {ratio:.2f}x of float16"
    print(f"KV cache: {size}")
    if args.target == "npu":
        used = artifact.disk_use(args.output)
        links = f"{used.weights / 1e6:,.1f} MB of linked weights"
        print(f"{args.output}: {used.extra / 1e6:.2f} MB beside {links}")


def main() -> int:
    """Run kvc8-compile."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
