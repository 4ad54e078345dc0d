"""What the settings of a quantization mean for a recipe, and for the engine that is to serve it."""

from pathlib import Path

import torch

from kvc8.ir.capture.build import config_dtype
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.tools.quantizer.engine_form import DESCRIPTIONS, check_dtype
from kvc8.tools.quantizer.engines import ENGINES, NAMES, Engine
from kvc8.tools.quantizer.recipes import kvc8, msmodelslim
from kvc8.tools.quantizer.settings import Recipe, Settings


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
    if given.k_offsets and engine == "mindie":
        what = f"{name} makes every offset 0"
        raise ModelError("--k-offsets", what, "leave it out, or use --for vllm-ascend")
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
    rotate = given.rotate == "on"
    return kvc8.RecipeOptions(given.kv_cache, rotate, given.positions, given.seed, given.k_offsets)
