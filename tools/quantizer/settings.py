"""What a quantization is told, apart from how it is typed, and what it means for a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.tools.quantizer.engine_form import DESCRIPTIONS, ENGINES, NAMES, Engine, check_dtype
from kvc8.tools.quantizer.recipes import kvc8, msmodelslim

Recipe = Literal["kvc8", "minmax", "msmodelslim"]
SWEEPS: Mapping[Recipe, int] = {"kvc8": 1, "minmax": 1, "msmodelslim": 2}  # over a model
MOST_TOKENS = 512
HOW = ("samples", "max_tokens", "memory")  # of no option that --resume compares


@dataclass(frozen=True)
class Settings:
    """What is to be quantized, and how; what is None is the recipe's own default.

    Those of a recipe are refused where another is asked for: `recipe_of` and `engine_of` say so.
    """

    recipe: Recipe | None = None  # kvc8, or msmodelslim where an option is given that only it has
    engine: Engine | None = None  # who serves it; None: vllm-ascend, or msmodelslim's own form
    kv_cache: bool = True  # scales for an int8 KV cache
    disable: tuple[str, ...] = ()  # linears that stay float; * stands for any characters
    act: Literal["static", "dynamic", "mix"] = "static"  # scales of activations
    dynamic: tuple[str, ...] = ()  # linears whose activations have a scale a token
    down_proj: bool = False  # quantize these as well
    samples: int | None = None  # texts that are used
    max_tokens: int | None = None  # of each text
    memory: float | None = None  # bytes to take at most
    part_file_size: float | None = None  # bytes of a weights file, about
    rotate: Literal["on", "off"] = "on"  # recipe kvc8
    positions: int = 2048  # recipe kvc8: tokens of context that K's scales are for
    seed: int = 0  # recipe kvc8
    rollback: float | None = None  # recipe kvc8: percent of weights that may stay float
    act_method: Literal[1, 2, 3] | None = None  # this and the rest: recipe msmodelslim
    anti_method: Literal["none", "m3"] | None = None
    disable_level: int | None = None
    dtype: Literal["config", "float32"] = "config"
    save_type: Literal["ascendV1", "safe_tensor"] = "ascendV1"
    kv_asym: bool = False


def recipe_of(given: Settings) -> Recipe:
    """The recipe; the vendor's own options ask for the vendor's."""
    own = {
        "--act-method": given.act_method is not None,
        "--anti-method": given.anti_method is not None,
        "--disable-level": given.disable_level is not None,
        "--dtype float32": given.dtype == "float32",
        "--save-type safe_tensor": given.save_type != "ascendV1",
        "--kv-asym": given.kv_asym,
    }
    vendors = [name for name, here in own.items() if here]
    recipe = given.recipe or ("msmodelslim" if vendors else "kvc8")
    if recipe != "msmodelslim" and vendors:
        raise ModelError(
            vendors[0],
            f"is not for --recipe {recipe}",
            "leave it out or use --recipe msmodelslim",
        )
    tokens = ["--dynamic"] if given.dynamic else ["--act"] if given.act != "static" else []
    if recipe == "msmodelslim" and tokens:
        what = f"is not for --recipe {recipe}"
        raise ModelError(tokens[0], what, "leave it out or use --recipe kvc8")
    if recipe != "kvc8" and given.rollback is not None:
        raise ModelError(
            "--rollback", f"is not for --recipe {recipe}", "leave it out or use --recipe kvc8"
        )
    return recipe


def engine_of(given: Settings, source: Path, recipe: Recipe, dtype: torch.dtype) -> Engine | None:
    """The engine whose form is written; None for the vendor's. `dtype` is config.json's.

    Raises ModelError where the engine that is named would misread what is asked for.
    """
    engine = given.engine
    if engine is None:
        return None if recipe == "msmodelslim" else ENGINES[0]
    name = NAMES[engine]
    check_dtype(dtype, place(source, "config.json"), engine)
    if given.kv_asym:
        what = f"{name} does not take zero points off again"
        raise ModelError("--kv-asym", what, "leave it out, or leave --for out for kvc8 alone")
    if given.dtype == "float32":
        what = f"{name} copies its tensors into parameters of {str(dtype).removeprefix('torch.')}"
        raise ModelError("--dtype float32", what, "leave it out")
    if given.save_type == "safe_tensor" and engine == "vllm-ascend":
        what = f"{name} looks for {DESCRIPTIONS[engine]} only"
        raise ModelError("--save-type safe_tensor", what, "leave it out")
    return engine


def run_dtype(given: Settings, checkpoint: Checkpoint, recipe: Recipe) -> torch.dtype:
    """What the model runs in. Recipes of ours calibrate in float32."""
    vendor = recipe == "msmodelslim" and given.dtype == "config"
    return config_dtype(checkpoint) if vendor else torch.float32


def vendor_options(given: Settings, dtype: torch.dtype) -> msmodelslim.VendorOptions:
    """What the recipe msmodelslim is told; where the script has a default, its default."""
    return msmodelslim.VendorOptions(
        act_method=given.act_method or 1,
        m3=given.anti_method == "m3",
        level=given.disable_level or 0,
        disabled=given.disable,
        down_proj=given.down_proj,
        kv=given.kv_cache,
        symmetric=not given.kv_asym,
        dtype=dtype,
        layout=given.save_type,
    )


def kvc8_options(given: Settings) -> kvc8.RecipeOptions:
    """What the recipe kvc8 is told."""
    return kvc8.RecipeOptions(given.kv_cache, given.rotate == "on", given.positions, given.seed)


def written(given: Settings, recipe: Recipe) -> dict[str, object]:
    """What changes what is written, as a run that goes on compares it."""
    every = {each.name: getattr(given, each.name) for each in fields(given)}
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in every.items()}
    return {"recipe": recipe, **{n: v for n, v in plain.items() if n not in (*HOW, "recipe")}}
