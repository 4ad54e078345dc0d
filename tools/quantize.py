"""kvc8-quantize: a float model to W8A8 with an int8 KV cache.

    kvc8-quantize model_dir -o out --calib-file texts.jsonl --use-kvcache-quant

The result has msModelSlim's ascendV1 layout and differs from msModelSlim's in its numbers:

    K and V      symmetric per channel, K measured after RoPE, where the cache stores it
    activations  static per tensor, from the least and greatest value of all texts
    weights      symmetric per output channel, computed in float32
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from kvc8.ir.capture import capture
from kvc8.ir.checkpoint import Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.model_files import listed, place
from kvc8.tools.command import entry
from kvc8.tools.quantizer.calibrate import Report, calibrate, vocabulary
from kvc8.tools.quantizer.calibration_data import encode_texts, read_texts
from kvc8.tools.quantizer.model import choose, not_copied, plan, write_model
from kvc8.tools.quantizer.writer import check_new
from kvc8.tools.tokenize import read_tokenizer

RECIPES = {"minmax": "min-max, K after RoPE"}  # by name, what the description notes
DIFFERENCES = (
    "unlike msModelSlim, K is measured after RoPE, so that it does not clip; K and V are "
    "symmetric; and a range is what all texts reach, not a mean of them and not a histogram's"
)
# What the vendor's script takes and this recipe does not do: by option, what it does.
ONLY = (
    ("w_bit", 8, "weights are 8 bits wide"),
    ("a_bit", 8, "activations are 8 bits wide"),
    ("act_method", 1, "activation ranges are the least and greatest value (1)"),
    ("anti_method", "none", "outliers are not smoothed (none)"),
    ("disable_level", "L0", "layers are not chosen by their range (L0)"),
    ("device_type", "cpu", "calibration runs on the CPU (cpu)"),
)


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-quantize, in its own spelling and the vendor script's."""
    found = argparse.ArgumentParser(
        prog="kvc8-quantize",
        description=__doc__.splitlines()[0],
        epilog=f"The vendor script's spellings are taken too; {DIFFERENCES}.",
    )
    found.add_argument("directory", type=Path, nargs="?", help="the float model")
    found.add_argument("--model_path", "--model-path", type=Path, help="the float model")
    found.add_argument(
        *("-o", "--output", "--save_directory", "--save-directory"), type=Path, required=True
    )
    found.add_argument(
        *("--calib-file", "--calib_file"), type=Path, required=True, help="JSON lines or plain text"
    )
    found.add_argument("--samples", type=_count, help="use so many texts of the file")
    found.add_argument("--max-tokens", type=_count, default=512, help="of each text (512)")
    _add_recipe(found)
    return found


def _add_recipe(found: argparse.ArgumentParser) -> None:
    found.add_argument(
        "--recipe", choices=RECIPES, default="minmax", help="how numbers are chosen (minmax)"
    )
    for name, real, does in ONLY:
        spelled = ("--" + name.replace("_", "-"), "--" + name)
        found.add_argument(*spelled, type=type(real), default=real, help=does)
    cache = found.add_mutually_exclusive_group()
    cache.add_argument(
        *("--use-kvcache-quant", "--use_kvcache_quant"),
        type=_truth,
        nargs="?",
        const=True,
        default=True,
        help="scales for an int8 KV cache (the default)",
    )
    cache.add_argument("--no-use-kvcache-quant", dest="use_kvcache_quant", action="store_false")
    found.add_argument(
        *("--disable", "--disable_names", "--disable-names"),
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="linears that stay float (* for any characters), and those that read the same value",
    )
    found.add_argument("--down-proj", action="store_true", help="quantize down_proj as well")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def work(args: argparse.Namespace) -> int:
    """Measure and write; gives the exit status."""
    source = _source(args)
    check_new(args.output)
    checkpoint = open_checkpoint(source)
    _check_float(checkpoint)
    texts = read_texts(args.calib_file, args.samples)
    tokenizer = read_tokenizer(source)
    program = capture(checkpoint, torch.float32)
    chosen, left = choose(program, args.disable, args.down_proj)
    if not chosen and not args.use_kvcache_quant:
        raise ModelError("--disable: leaves nothing to quantize; name fewer linears")
    rows = encode_texts(
        texts, lambda text: tokenizer.encode_any(text.content), args.max_tokens, vocabulary(program)
    )
    tokens = sum(map(len, rows))
    with _progress("calibrating", tokens) as report:
        seen = calibrate(program, checkpoint, rows, args.max_tokens, report)
    made = plan(program, checkpoint, chosen, seen, args.use_kvcache_quant)
    notes = {"recipe": RECIPES[args.recipe], "texts": len(rows), "tokens": tokens}
    if made.kv:
        notes = {"kv_calibrated": "post-rope", **notes}
    with _progress("writing", sum(entry.nbytes for entry in made.entries())) as report:
        write_model(made, args.output, notes, report)
    print(f"{args.output}: {len(chosen)} linears in W8A8, {len(left)} float, lm_head float")
    if made.kv:
        print(f"K (after RoPE) and V of {len(made.kv) // 2} layers measured on {tokens:,} tokens")
    return 0


def _source(args: argparse.Namespace) -> Path:
    """The model's directory; refuses options that this recipe would have to ignore."""
    for name, real, does in ONLY:
        given = getattr(args, name)
        if given != real:
            option = "--" + name.replace("_", "-")
            raise ModelError(f"{option}: {given} is not there yet, {does}; leave the option out")
    if (args.directory is None) == (args.model_path is None):
        count = "no model is named" if args.directory is None else "two models are named"
        raise ModelError(f"kvc8-quantize: {count}; give one directory")
    if args.model_path is not None:  # somebody who comes from the vendor's script
        print(f"note: {DIFFERENCES}", file=sys.stderr)
    source: Path = args.directory or args.model_path
    return source


def _check_float(checkpoint: Checkpoint) -> None:
    if checkpoint.layout != "float":
        what = f"is quantized already ({checkpoint.layout})"
        raise ModelError(f"{place(checkpoint.path)}: {what}; name the float model it came from")
    for warning in checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if rest := not_copied(checkpoint):
        print(f"note: {place(checkpoint.path)}: {listed(rest)} is not copied", file=sys.stderr)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Report]:
    """A bar on the terminal, if stderr is one."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, where: bar.update(task, completed=done, description=f"{title} {where}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kvc8-quantize."""
    # A run that is told to end takes back what it has written, as one that is interrupted does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return entry(parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
