"""The page of kvc8-verify: its figures along the layers, beside what the passes do."""

import argparse
from collections.abc import Sequence

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.passes import pipeline
from kvc8.tools.driver.arguments import options_of
from kvc8.tools.driver.compiling import quantize
from kvc8.tools.reporter.compiled import facts
from kvc8.tools.reporter.heat import Heat
from kvc8.tools.reporter.page import MEASURED, Page, write
from kvc8.tools.reporter.steps import PassSteps

UNMEASURED = "Nothing was measured along the layers: passes, sensitivity and all do that."


def write_page(args: argparse.Namespace, checkpoint: Checkpoint, heats: Sequence[Heat]) -> None:
    """Run the passes and write the page that `--report` names, and say so.

    Raises TargetError where the file cannot be written.
    """
    steps, program = PassSteps(), capture(checkpoint)
    options = options_of(args)
    quantize(program, options, steps.see, checkpoint.read)
    pipeline.lower_for_npu(program, options, steps.see)
    page = Page(args.directory.resolve().name, facts(args, program), steps)
    page.absent = "This page is of kvc8-verify; kvc8-compile --report R.html tells of these."
    page.heats, page.measured = heats, MEASURED if heats else UNMEASURED
    size = write(page, args.report)
    if not args.json:
        print(f"{args.report}: {size / 1e6:.2f} MB, a page that needs no network")
