"""The page of kvc8-compile: what its arguments and its result say, beside what its passes did."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir.program import Program
from kvc8.passes.options import NAMES
from kvc8.tools.reporter.costs import Explained, Report
from kvc8.tools.reporter.heat import Heat
from kvc8.tools.reporter.page import MEASURED, Page, write
from kvc8.tools.reporter.steps import PassSteps

UNMEASURED = "Nothing was measured: compile with --check, which runs each pass on recorded tokens."


def write_page(
    args: argparse.Namespace,
    program: Program,
    steps: PassSteps,
    heats: Sequence[Heat],
    npu: tuple[Report, Explained] | None = None,
) -> None:
    """Write the page that `--report` names, and say so; `npu` is costs.report and costs.explained.

    `program` is QUANTIZED. Raises TargetError where the file cannot be written.
    """
    target = f"{args.target} {args.soc}"
    if args.target == "onnx":
        target = f"onnx, {args.flavor or 'standard'}"
    told = {
        "target": target,
        "compute in": args.dtype or "as config.json says",
        "tokens a block": str(args.block_size),
        **facts(args, program),
    }
    page = Page(title=args.directory.resolve().name, facts=told, steps=steps)
    page.seconds = steps.seconds if args.times else None
    page.heats, page.measured = heats, MEASURED if args.check else UNMEASURED
    if npu:
        page.cost, explained = npu
        page.choices, page.left_alone = explained.choices, explained.left_alone
    size = write(page, Path(args.report))
    if not args.json:
        print(f"{args.report}: {size / 1e6:.2f} MB, a page that needs no network")


def facts(args: argparse.Namespace, program: Program) -> dict[str, str]:
    """What a page says first, of a QUANTIZED program and of the arguments that choose passes."""
    layout = kv_layout(program)
    ratio = layout.bytes_per_token / layout.float16_bytes_per_token
    chosen = {f"--{n.replace('_', '-')}": str(getattr(args, n)) for n in NAMES}
    return {
        "KV cache": f"{layout.bytes_per_token:,} bytes a token, {ratio:.2f}x of float16",
        **chosen,
        "on a device": "not verified: NPU ops are emulated as they are documented",
    }
