"""The command line of kvc8-quantize, in its own spelling and in the vendor script's."""

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvc8.ir.errors import ModelError
from kvc8.tools.quantizer.engines import ENGINES
from kvc8.tools.quantizer.settings import MOST_TOKENS, SWEEPS, Settings

ANTI_METHODS = ("none", "m1", "m2", "m3", "m4")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_options(found: argparse.ArgumentParser) -> None:
    """Add all of them."""
    found.add_argument("directory", type=Path, nargs="?", help="the float model")
    _option(found, "model_path", type=Path, help="the float model")
    found.add_argument(
        *("-o", "--output", "--save_directory", "--save-directory"), type=Path, required=True
    )
    what = f"who serves it ({ENGINES[0]}; recipe msmodelslim: as its script writes it)"
    found.add_argument("--for", dest="engine", choices=ENGINES, help=what)
    _option(found, "calib_file", type=Path, required=True, help="JSON lines or plain text")
    _option(found, "samples", type=_count, help="use so many texts of the file")
    what = f"of each text ({MOST_TOKENS}; recipe msmodelslim: all)"
    _option(found, "max_tokens", type=_count, help=what)
    _option(found, "recipe", choices=SWEEPS, help="how numbers are chosen")
    _add_kvc8(found)
    _add_vendor(found)
    _add_choice(found)
    _option(found, "resume", action="store_true", help="go on with a run that was killed")
    _option(found, "memory", type=_amount, metavar="SIZE", help="use no more, as 2G or 800M")
    size = "split weights into files of about so many GB"
    _option(found, "part_file_size", type=_gigabytes, metavar="GB", help=size)


def _option(found: argparse._ActionsContainer, name: str, **settings: object) -> None:
    """An option in both spellings."""
    spelled = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
    found.add_argument(*spelled, **settings)  # type: ignore[arg-type]


def _add_kvc8(found: argparse.ArgumentParser) -> None:
    what = "recipe kvc8: turn the model so that no channel stands out (on)"
    _option(found, "rotate", choices=("on", "off"), default="on", help=what)
    what = "recipe kvc8: scales of K for a context of so many tokens (all that the model takes)"
    _option(found, "positions", type=_count, metavar="N", help=what)
    _option(found, "seed", type=int, default=0, help="recipe kvc8: of its random numbers (0)")
    what = "recipe kvc8: offsets of K, for kvc8 and vllm-ascend; not for MindIE or ONNX's gqa"
    _option(found, "k_offsets", action="store_true", help=what)
    what = (
        "recipe kvc8: measure what each linear costs its layer, and leave the worst float, "
        "up to so many percent of their weights"
    )
    _option(found, "rollback", type=_percent, metavar="PERCENT", help=what)


def _add_vendor(found: argparse.ArgumentParser) -> None:
    _option(found, "w_bit", type=int, default=8, help="weights are 8 bits wide")
    _option(found, "a_bit", type=int, default=8, help="activations are 8 bits wide")
    act = "ranges of activations: 1 mean of extremes, 2 histogram, 3 by layer"
    _option(found, "act_method", type=int, choices=(1, 2, 3), help=act)
    _option(found, "anti_method", choices=ANTI_METHODS, help="smoothing of outliers: none or m3")
    _option(found, "disable_level", type=_level, metavar="Lk", help="leave out the k hardest")
    _option(found, "device_type", default="cpu", help="taken, and the CPU is used")
    kinds = ("config", "float32")
    what = "what the model runs in; on a CPU the vendor's script uses float32"
    _option(found, "dtype", choices=kinds, default="config", help=what)
    layouts = ("ascendV1", "safe_tensor")
    _option(found, "save_type", choices=layouts, default="ascendV1", help="of files (ascendV1)")
    _option(found, "kv_asym", action="store_true", help="K and V with offsets; runtimes drop them")


def _add_choice(found: argparse.ArgumentParser) -> None:
    cache = found.add_mutually_exclusive_group()
    what = "scales for an int8 KV cache (the default)"
    spelled = ("--use-kvcache-quant", "--use_kvcache_quant")
    cache.add_argument(
        *spelled, dest="kv_cache", type=_truth, nargs="?", const=True, default=True, help=what
    )
    cache.add_argument("--no-use-kvcache-quant", dest="kv_cache", action="store_false")
    found.add_argument(
        *("--disable", "--disable_names", "--disable-names"),
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="linears that stay float (* for any characters), and those that read the same value",
    )
    kinds = ("static", "dynamic", "mix")
    what = "activations by one scale, by one a token, or stored for both (static); experts: a token"
    _option(found, "act", choices=kinds, default="static", help=what)
    what = "linears whose activations have a scale a token (* for any characters)"
    found.add_argument(
        "--dynamic", nargs="+", action="extend", default=[], metavar="NAME", help=what
    )
    found.add_argument("--down-proj", action="store_true", help="quantize down_proj as well")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _amount(text: str) -> float:
    """Bytes, from "2G", "1.5g", "800M" or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)b?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 2G or 800M")
    return float(found[1]) * UNITS[found[2].upper()]


def _gigabytes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return float(text) * 1e9


def _percent(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?%?", text) or float(text.rstrip("%")) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; write 5 or 2.5")
    return float(text.rstrip("%"))


def _level(text: str) -> int:
    if not re.fullmatch(r"L\d{1,6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no level; write L0, L1, L2 ...")
    return int(text[1:])


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def source_of(args: argparse.Namespace) -> Path:
    """The model's directory; refuses what no recipe can do."""
    for name, what in (("w_bit", "weights"), ("a_bit", "activations")):
        if (bits := getattr(args, name)) != 8:
            option = "--" + name.replace("_", "-")
            raise ModelError(
                option, f"{bits} is not there yet, {what} are 8 bits wide", "leave the option out"
            )
    if args.anti_method in ("m1", "m2", "m4"):
        raise ModelError("--anti-method", f"{args.anti_method} is not there yet", "use m3 or none")
    if (args.directory is None) == (args.model_path is None):
        count = "no model is named" if args.directory is None else "two models are named"
        raise ModelError("kvc8-quantize", count, "give one directory")
    if args.device_type != "cpu":
        print(
            f"note: --device-type {args.device_type}: calibration runs on the CPU", file=sys.stderr
        )
    source: Path = args.directory or args.model_path
    return source


def settings_of(args: argparse.Namespace) -> Settings:
    """What was typed, without the directories."""
    given = {name: getattr(args, name) for name in (each.name for each in fields(Settings))}
    made: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    return Settings(**made)
