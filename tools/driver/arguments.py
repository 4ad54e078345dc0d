"""Arguments that several commands take."""

import argparse

from kvc8.ir.errors import TargetError
from kvc8.passes.options import NAMES, Options, choices

HELP = {
    "kv_scales": "widen K scales that were measured before RoPE (default), or use them as they are",
    "kv_scales_by": "static scales of the checkpoint's channels (default), or each token's own, "
    "made as it is written; nothing clips then, and K and V take 4 bytes a token more each",
    "prefill_kv": "what a prompt sees of itself: its own K and V (default), or what the cache "
    "gives back of them",
    "fold": "drop the cache's offsets where that is exact (default), or fold its scales as well",
    "fuse": "do by one launch what one op does that takes several (default), or leave them apart",
    "kv_format": "how int8 caches lie in memory; nz fits few models (docs/phases.md)",
    "nz_heads": "heads that nz takes: those of the op's document (default), or any, as some serve",
    "sums": "how --tp adds up W8A8 linears: exactly (default), or in half the bytes, as engines do",
}


def add_options(to: argparse.ArgumentParser, names: tuple[str, ...] = NAMES) -> None:
    """Add an argument for each of passes.options.Options, or for some of them."""
    for name in names:
        allowed = choices(name)
        flag = f"--{name.replace('_', '-')}"
        to.add_argument(flag, choices=allowed, default=allowed[0], help=HELP[name])


def add_ranks(to: argparse.ArgumentParser) -> None:
    """Add the argument that divides a model."""
    text = "devices to divide the model among (tensor parallelism); default: 1"
    to.add_argument("--tp", type=int, default=1, metavar="N", help=text)


def options_of(args: argparse.Namespace) -> Options:
    """The Options that a command was given."""
    if args.tp < 1:
        raise TargetError("--tp", f"{args.tp} devices", "give 1 or more")
    return Options(**{name: getattr(args, name) for name in NAMES}, ranks=args.tp)


def add_kv_calibrated(to: argparse.ArgumentParser) -> None:
    """Add the argument of driver.compiling.open_calibrated."""
    to.add_argument(
        "--kv-calibrated",
        choices=("pre-rope", "post-rope"),
        help="where K was measured; what the directory's layout implies if unset",
    )
