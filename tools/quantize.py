"""kvc8-quantize: a float model to W8A8 with an int8 KV cache.

    kvc8-quantize model_dir -o out --calib-file texts.jsonl --use-kvcache-quant

The result has msModelSlim's ascendV1 layout and differs from msModelSlim's in its numbers:

    K and V      symmetric per channel, K measured after RoPE, where the cache stores it
    activations  static per tensor, from the least and greatest value of all texts
    weights      symmetric per output channel, computed in float32
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from kvc8.ir.capture import capture
from kvc8.ir.checkpoint import Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program
from kvc8.tools.calibrate import Statistics, calibrate, vocabulary
from kvc8.tools.calibration_data import encode_texts, read_texts
from kvc8.tools.command import entry
from kvc8.tools.quantize_model import choose, plan, write_model
from kvc8.tools.quantize_writer import check_new
from kvc8.tools.tokenize import read_tokenizer

RECIPE = "min-max, K after RoPE"
# What the vendor's script takes and this recipe does not do: by option, what it does.
ONLY = (
    ("w_bit", (8,), "weights are 8 bits wide"),
    ("a_bit", (8,), "activations are 8 bits wide"),
    ("act_method", (1,), "activation ranges are the least and greatest value (1)"),
    ("anti_method", ("none",), "outliers are not smoothed (none)"),
    ("disable_level", ("L0",), "layers are not chosen by their range (L0)"),
)


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-quantize, in its own spelling and the vendor script's."""
    found = argparse.ArgumentParser(prog="kvc8-quantize", description=__doc__.splitlines()[0])
    found.add_argument("directory", type=Path, nargs="?", help="the float model")
    found.add_argument("--model_path", "--model-path", type=Path, dest="model_path")
    found.add_argument(
        "-o", "--output", "--save_directory", "--save-directory", type=Path, required=True
    )
    found.add_argument("--calib-file", "--calib_file", type=Path, required=True)
    found.add_argument("--w-bit", "--w_bit", type=int, default=8)
    found.add_argument("--a-bit", "--a_bit", type=int, default=8)
    found.add_argument("--act-method", "--act_method", type=int, default=1)
    found.add_argument("--anti-method", "--anti_method", default="none")
    found.add_argument("--disable-level", "--disable_level", default="L0")
    found.add_argument("--device-type", "--device_type", choices=("cpu", "npu"), default="cpu")
    found.add_argument(
        *("--use-kvcache-quant", "--use_kvcache_quant"),
        nargs="?",
        const="True",
        default="True",
        choices=("True", "False"),
    )
    found.add_argument("--disable", nargs="*", default=[], help="linears that stay float, by name")
    found.add_argument("--down-proj", action="store_true", help="quantize down_proj as well")
    found.add_argument("--samples", type=int, help="use so many texts of the file")
    found.add_argument("--max-tokens", type=int, default=512, help="of each text")
    return found


def work(args: argparse.Namespace) -> int:
    """Measure and write; gives the exit status."""
    source = _source(args)
    check_new(args.output)
    checkpoint = open_checkpoint(source)
    if checkpoint.layout != "float":
        what = f"{source.name}: is quantized already ({checkpoint.layout})"
        raise ModelError(f"{what}; name the float model it came from")
    program = capture(checkpoint, torch.float32)
    chosen, left = choose(program, args.disable, args.down_proj)
    texts = read_texts(args.calib_file, args.samples)
    tokenizer = read_tokenizer(source)
    rows = encode_texts(
        texts, lambda text: tokenizer.encode_any(text.content), args.max_tokens, vocabulary(program)
    )
    seen = _measure(program, checkpoint, rows, args.max_tokens)
    made = plan(program, checkpoint, chosen, seen, args.use_kvcache_quant == "True")
    tokens = sum(map(len, rows))
    notes = {
        "kv_calibrated": "post-rope",
        "recipe": RECIPE,
        "texts": len(rows),
        "tokens": tokens,
    }
    write_model(made, args.output, notes, lambda _: None)
    print(f"{args.output}: {len(chosen)} linears in W8A8, {len(left)} float, lm_head float")
    print(f"K (after RoPE) and V of {len(made.kv) // 2} layers measured on {tokens:,} tokens")
    return 0


def _source(args: argparse.Namespace) -> Path:
    """The model's directory; refuses options that this recipe would have to ignore."""
    for name, real, does in ONLY:
        given = getattr(args, name)
        if given not in real:
            option = "--" + name.replace("_", "-")
            raise ModelError(f"{option}: {given} is not there yet, {does}; leave the option out")
    source: Path | None = args.directory or args.model_path
    if source is None:
        raise ModelError("kvc8-quantize: no model is named; give its directory")
    return source


def _measure(
    program: Program, checkpoint: Checkpoint, rows: list[list[int]], most: int
) -> Statistics:
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("calibrating", total=sum(map(len, rows)))

        def report(done: int, layer: str) -> None:
            bar.update(task, completed=done, description=layer)

        return calibrate(program, checkpoint, rows, most, report)


def main() -> int:
    """Run kvc8-quantize."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
