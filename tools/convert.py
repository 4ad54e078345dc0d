"""kvc8-convert: a quantized directory in the form that a serving engine wants.

    kvc8-convert DIR --for vllm-ascend -o OUT

Nothing is measured again. K scales that were measured before RoPE are widened to what holds after
it, and zero points, which engines do not take off, are given up for wider scales. Weights files in
which nothing changes are linked. `tools/quantizer/engine_form.py` says how each engine wants it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.new_directory import refuse_existing
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_kv_calibrated
from kvc8.tools.driver.request import open_calibrated
from kvc8.tools.quantizer.engines import ENGINES, NAMES

if TYPE_CHECKING:
    from kvc8.tools.engines.convert import Converted


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-convert."""
    found = argparse.ArgumentParser(
        prog="kvc8-convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("directory", type=Path, help="a W8A8 or C8 directory of msModelSlim's kind")
    found.add_argument("--for", dest="engine", choices=ENGINES, required=True, help="who serves it")
    found.add_argument("-o", "--output", type=Path, required=True)
    add_kv_calibrated(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Convert and say what was done; gives the exit status."""
    refuse_existing(args.output)
    checkpoint = open_calibrated(args.directory, args.kv_calibrated)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    # torch takes a second to import: what is wrong comes first.
    from kvc8.tools.engines.convert import convert

    _tell(args, convert(checkpoint, args.engine, args.output))
    return 0


def _tell(args: argparse.Namespace, done: "Converted") -> None:
    files = f"{done.linked} weights files linked, {done.written} written"
    print(f"{args.output}: for {NAMES[args.engine]}, {files}")
    if done.mended.widened:
        print(f"K scales of {done.mended.widened} layers widened to what holds after RoPE")
    if done.mended.symmetric:
        print(f"zero points of {done.mended.symmetric} caches given up for wider scales")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kvc8-convert."""
    return entry(parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
