"""kvc8-device-check: find out on an NPU what kvc8 assumes of it, in one command.

    kvc8-device-check -o DIR

DIR gets report.json and report.html, which name no path, host or user: send them with an issue.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.tools.command import entry

if TYPE_CHECKING:  # declares the NPU's ops, which torch_npu must do first
    from kvc8.tools.device_checker.check import Report, Tell
    from kvc8.tools.device_checker.runner import Opener

REPOSITORY = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-device-check."""
    found = argparse.ArgumentParser(prog="kvc8-device-check", description=__doc__.splitlines()[0])
    add = found.add_argument
    wanted = found.add_mutually_exclusive_group(required=True)
    wanted.add_argument("-o", "--output", type=Path, metavar="DIR", help="a new directory")
    wanted.add_argument(
        "--apply", type=Path, metavar="FILE", help="print what a report.json would change"
    )
    add("--device", default="npu:0", help="default: npu:0")
    add("--soc", default="ascend910b", help="whose limits are tried; default: ascend910b")
    add(
        "--golden",
        type=Path,
        default=REPOSITORY / "tests" / "golden",
        metavar="DIR",
        help="the vectors and calls; default: tests/golden beside kvc8, as a clone has it",
    )
    add("--limit", type=float, metavar="SECONDS", help="of each probe; default: 60, a model 600")
    return found


def work(given: argparse.Namespace) -> int:
    """Check a device, or print what a report would change."""
    from kvc8.backends.npu.device import load_torch_npu

    if given.apply:
        from kvc8.tools.device_checker import apply

        print("\n".join(apply.changes(apply.read_report(given.apply))))
        return 0
    load_torch_npu(
        cure="install kvc8[npu] on a machine with CANN"
    )  # and before kvc8 declares the ops
    from kvc8.tools.device_checker.npu import open_npu

    make_report(given, partial(open_npu, given.device))
    return 0


def make_report(given: argparse.Namespace, opener: "Opener", *, small: bool = False) -> "Report":
    """Run all probes on what `opener` opens, write the report, and say what was found."""
    from kvc8.ir.checkpoint.new_directory import new_directory, refuse_existing
    from kvc8.tools.device_checker import check
    from kvc8.tools.reporter import device

    refuse_existing(given.output)
    # Where torch_npu's own shape functions refuse a call, that is a result and not an accident.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with _progress() as tell:
        report = check.check(opener, given.soc, given.golden, tell, small=small, limit=given.limit)
    with new_directory(given.output) as made:
        check.write(report, made.path)
        (made.path / "report.html").write_text(device.render(report), encoding="utf-8")
    found = report["findings"]
    print(f"{given.output}: report.json and report.html; findings: {len(found)}")
    for each in found:
        print(f"    {each['kind']}: {each['name']}: {each['what']}")
    if not given.golden.is_dir():
        print("    no vectors and no limits were tried: --golden names no directory")
    return report


@contextmanager
def _progress() -> Iterator["Tell"]:
    """Show on stderr how many probes are done, and the last one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("begins", total=None)
        yield lambda done, of, name: bar.update(task, completed=done, total=of, description=name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kvc8-device-check; gives the exit status."""
    return entry(parser(), work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
