"""kvc8-inspect: what a model directory is, what is wrong with it, and what would run where.

    kvc8-inspect DIR

Reads headers and scales, no weights, and compiles without writing anything: with `--explain` it
says what was chosen. What the files say is printed before that. The exit status is 1 where a
finding is an error.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.reader import read_files
from kvc8.tools.command import ERROR, entry
from kvc8.tools.driver.arguments import add_kv_calibrated
from kvc8.tools.inspector.file_report import file_parts
from kvc8.tools.inspector.plan import plan
from kvc8.tools.inspector.stored import LATENT_RANK, stored

if TYPE_CHECKING:  # torch and transformers take seconds: imported when a directory can be read
    from kvc8.tools.inspector.finding import Finding
    from kvc8.tools.inspector.seen import Seen
    from kvc8.tools.reporter.costs import Explained

SOC, BLOCK_SIZE = "ascend910b", 128  # kvc8-compile's defaults
ORDER = ("error", "warning", "note")


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-inspect."""
    found = argparse.ArgumentParser(prog="kvc8-inspect", description=__doc__.splitlines()[0])
    found.add_argument("directory", type=Path, help="the model")
    found.add_argument("--json", action="store_true", help="print everything as JSON")
    found.add_argument(
        "--explain",
        action="store_true",
        help="compile in memory, and say why an NPU program has the ops that it has",
    )
    add_kv_calibrated(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Inspect a directory; gives 1 where something is wrong that the compiler refuses."""
    known = stored(read_files(args.directory), args.kv_calibrated)
    early = not args.json and not known.config.get(LATENT_RANK)  # latents are seen when captured
    if early:
        _show(file_parts(known))
    from kvc8.tools.inspector.report import as_json, seen_parts
    from kvc8.tools.inspector.seen import capture_stored

    seen = capture_stored(known)
    findings = find(seen)
    refused = any(finding.severity == "error" for finding in findings)
    reasons = None if refused or not args.explain else _reasons(args)
    if args.json:
        found = as_json(seen, findings, plan(seen))
        print(
            json.dumps({**found, **({"explain": reasons.as_json()} if reasons else {})}, indent=1)
        )
        return ERROR if refused else 0
    parts = file_parts(seen) if seen.latent or not early else []
    _show([*parts, *seen_parts(seen, findings)], first=not early)
    if reasons:
        from kvc8.tools.reporter.costs import explain_lines

        print(*explain_lines(reasons), sep="\n")
    return ERROR if refused else 0


def _show(parts: Iterable[list[str]], first: bool = True) -> None:
    """Print parts of the report, each as soon as it is known, with an empty line between them."""
    for number, lines in enumerate(parts):
        print(*([] if first and not number else [""]), *lines, sep="\n", flush=True)


def _reasons(args: argparse.Namespace) -> "Explained":
    """Lower the model without writing anything: why each op was chosen."""
    from kvc8.backends.npu.legality import check  # these take seconds that a plain look need not
    from kvc8.ir.capture.trace import capture
    from kvc8.passes import pipeline
    from kvc8.tools.driver.compiling import quantize
    from kvc8.tools.driver.request import open_calibrated
    from kvc8.tools.reporter.costs import explained
    from kvc8.tools.reporter.pass_facts import sites_of

    program = capture(open_calibrated(args.directory, args.kv_calibrated))
    told = quantize(program)
    lowered, more = pipeline.lower_for_npu(program)
    for phase in lowered.values():
        check(phase, SOC, BLOCK_SIZE)
    return explained(lowered, sites_of(told + more), SOC, BLOCK_SIZE)


def find(seen: "Seen") -> "list[Finding]":
    """Everything that the checks find, errors first; and a refusal that no check explains."""
    from kvc8.tools.inspector.finding import Finding, inside
    from kvc8.tools.inspector.kv_findings import KV_CHECKS
    from kvc8.tools.inspector.model_findings import MODEL_CHECKS

    found = [finding for check in (*KV_CHECKS, *MODEL_CHECKS) for finding in check(seen)]
    if seen.refusal and not any(finding.severity == "error" for finding in found):
        where, so = inside(seen.refusal, seen.files.path), "kvc8-compile refuses it"
        found.append(Finding("refused", "error", where, seen.refusal.what, so, seen.refusal.do))
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def main() -> int:
    """Run kvc8-inspect."""
    gc.disable()  # as kvc8-compile does, for it lowers the model too
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
