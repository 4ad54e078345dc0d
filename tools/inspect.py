"""kvc8-inspect: what a model directory is, what is wrong with it, and what would run where.

    kvc8-inspect DIR

Reads headers and KV scales, no weights. The exit status is 1 where a finding is an error.
"""

import argparse
import sys
from pathlib import Path

from kvc8.tools.command import ERROR, entry
from kvc8.tools.compile import add_kv_calibrated
from kvc8.tools.inspector.finding import Finding, parts
from kvc8.tools.inspector.kv_findings import KV_CHECKS
from kvc8.tools.inspector.model_findings import MODEL_CHECKS
from kvc8.tools.inspector.plan import plan
from kvc8.tools.inspector.report import as_json, as_text
from kvc8.tools.inspector.seen import Seen, look

ORDER = ("error", "warning", "note")


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-inspect."""
    found = argparse.ArgumentParser(prog="kvc8-inspect", description=__doc__.splitlines()[0])
    found.add_argument("directory", type=Path, help="the model")
    found.add_argument("--json", action="store_true", help="print everything as JSON")
    add_kv_calibrated(found)
    return found


def work(args: argparse.Namespace) -> int:
    """Inspect a directory; gives 1 where something is wrong that the compiler refuses."""
    seen = look(args.directory, args.kv_calibrated)
    findings = find(seen)
    show = as_json if args.json else as_text
    print(show(seen, findings, plan(seen)))
    return ERROR if any(finding.severity == "error" for finding in findings) else 0


def find(seen: Seen) -> list[Finding]:
    """Everything that the checks find, errors first; and a refusal that no check explains."""
    found = [finding for check in (*KV_CHECKS, *MODEL_CHECKS) for finding in check(seen)]
    if seen.refusal and not any(finding.severity == "error" for finding in found):
        where, what, do = parts(seen.refusal, seen.files.path)
        found.append(Finding("refused", "error", where, what, "kvc8-compile refuses it", do))
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def main() -> int:
    """Run kvc8-inspect."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
