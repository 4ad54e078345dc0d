"""The arguments of `--report` and of what it is worked out for; nothing heavy is imported."""

import argparse
from pathlib import Path

from kvc8.backends.workload import Device, Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ask for a report of an NPU program, and that say for what."""
    add = parser.add_argument
    device, work = Device(), Workload()
    add(
        "--report",
        nargs="?",
        const=True,
        type=page_path,
        metavar="R.html",
        help="print what a step costs: launches, bytes, time; or write a page with this, what each "
        "pass did and, with --check, what it does to the numbers",
    )
    add("--times", action="store_true", help="with how long each pass took, on the page")
    add("--explain", action="store_true", help="print why each op was chosen, and which were not")
    add("--json", action="store_true", help="print all of this as one JSON object, nothing else")
    for name, value, unit, what in (
        ("--batch", work.batch, "N", "sequences of the reported step"),
        ("--context", work.context, "N", "tokens of each sequence"),
        ("--bandwidth", device.bandwidth / 1e12, "TB/S", "of the device's memory"),
        ("--int8-rate", device.int8 / 1e12, "TOPS", "its int8 operations"),
        ("--half-rate", device.half / 1e12, "TFLOPS", "its float16 operations"),
        ("--link-rate", device.link / 1e9, "GB/S", "with --tp: from a card to each other one"),
    ):
        kind = _count if isinstance(value, int) else _rate
        add(name, type=kind, default=value, metavar=unit, help=f"{what}; default: {value:g}")


def page_path(text: str) -> Path:
    """The file of a page, as an argument names it."""
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError(f"{text} is no .html file; to print, put --report last")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def device(args: argparse.Namespace) -> Device:
    """The device that the arguments describe."""
    rates = [x * 1e12 for x in (args.bandwidth, args.int8_rate, args.half_rate)]
    public = Device()
    given = rates != [public.bandwidth, public.int8, public.half]
    bandwidth, int8, half = rates
    link = args.link_rate * 1e9
    return Device(
        bandwidth,
        int8,
        half,
        "as given" if given else public.source,
        link,
        "as given" if link != public.link else public.link_source,
    )


def workload(args: argparse.Namespace) -> Workload:
    """The step that the arguments describe."""
    return Workload(args.batch, args.context, args.block_size, cards=args.tp)
