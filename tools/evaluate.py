"""kvc8-evaluate: what a quantized or compiled model loses against the float one, on a text.

    kvc8-evaluate OUT... --against FLOAT_DIR --text F

OUT is a model directory, run as its reference program in float32, an NPU artifact, emulated, or an
ONNX model. The text is cut into windows, and each of them is a prompt of its own, with the tokens
in front that the tokenizer puts before a text. The float model is computed in float32 and once for
all OUTs. Figures: perplexity, KL(float || OUT) in nats by its mean and its 99th percentile, and how
often both think the same token the likeliest; for windows over 1,024 tokens by position too.

With `--as vllm-ascend` or `--as mindie` a quantized directory is computed as that engine does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.model_files import file_names
from kvc8.tools.command import entry
from kvc8.tools.driver.arguments import add_kv_calibrated, add_options
from kvc8.tools.evaluator.text import read_text
from kvc8.tools.quantizer.engines import ENGINES

if TYPE_CHECKING:
    from kvc8.ir.checkpoint.reader import Checkpoint
    from kvc8.passes.options import Options

DTYPES = ("config", "float32", "float16")
MAPPED = 256  # tokens of the first window, on which each layer's caches are judged alone
PLOT = f"draw the KL by position, and by each layer's K and V alone ({MAPPED} tokens)"


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-evaluate."""
    found = argparse.ArgumentParser(prog="kvc8-evaluate", description=__doc__.splitlines()[0])
    found.add_argument("out", type=Path, nargs="+", metavar="OUT", help="what to judge")
    found.add_argument("--against", type=Path, required=True, help="the float model's directory")
    found.add_argument("--text", type=Path, required=True, help="a file of text, not calibrated on")
    found.add_argument("--windows", type=_count, default=8, help="so many windows of it (8)")
    found.add_argument("--window", type=_count, default=1024, help="tokens of a window (1024)")
    add_options(found, ("kv_scales", "kv_scales_by"))
    add_kv_calibrated(found)
    found.add_argument(
        "--float-cache", action="store_true", help="model directories: W8A8 alone, without C8"
    )
    found.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="what model directories compute in (float32)",
    )
    found.add_argument(
        "--as",
        dest="engine",
        choices=("kvc8", *ENGINES),
        action="append",
        help="compute model directories as this engine does, scales as they are; may be repeated",
    )
    what = "--as: so many tokens come as a prompt, which sees its own float K and V (1)"
    found.add_argument("--prompt", type=_count, default=1, metavar="N", help=what)
    what = "--as: all tokens come as prompts do, in chunks of so many; else as decode steps"
    found.add_argument("--chunk", type=_count, metavar="N", help=what)
    found.add_argument("--json", action="store_true", help="print the figures as JSON")
    found.add_argument("--plot", type=Path, metavar="PNG", help=PLOT)
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def work(args: argparse.Namespace) -> int:
    """Evaluate and print; gives the exit status."""
    for path in (args.against, *args.out):
        file_names(path)  # says so where there is no such directory
    read_text(args.text)
    from kvc8.tools.evaluator.evaluating import evaluate  # torch and transformers take seconds

    return evaluate(args, _by_cache)


def _by_cache(
    checkpoint: "Checkpoint", window: list[int], options: "Options"
) -> list[tuple[str, float]]:
    """The KL of each cache alone."""
    from kvc8.tools.verifier.sensitivity import sensitivity

    costs = sensitivity(checkpoint, window[:MAPPED], options)
    return [(cost.cache, cost.kl) for cost in costs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kvc8-evaluate."""
    return entry(parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
