"""What a quantization is told, apart from how it is typed; nothing heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from kvc8.ir.errors import ModelError
from kvc8.tools.quantizer.engines import Engine

Recipe = Literal["kvc8", "minmax", "msmodelslim"]
SWEEPS: Mapping[Recipe, int] = {"kvc8": 1, "minmax": 1, "msmodelslim": 2}  # over a model
MOST_TOKENS = 512
HOW = ("samples", "max_tokens", "memory")  # of no option that --resume compares


@dataclass(frozen=True)
class Settings:
    """What is to be quantized, and how; what is None is the recipe's own default.

    Those of a recipe are refused where another is asked for: `recipe_of` and
    recipe_settings.engine_of say so.
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
    positions: int | None = None  # recipe kvc8: tokens that K's scales are for; None: all of them
    seed: int = 0  # recipe kvc8
    k_offsets: bool = False  # recipe kvc8: of K's cache, which softmax takes off again
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
    only = {"--rollback": given.rollback is not None, "--k-offsets": given.k_offsets}
    ours = [name for name, here in only.items() if here]
    if recipe != "kvc8" and ours:
        what = f"is not for --recipe {recipe}"
        raise ModelError(ours[0], what, "leave it out or use --recipe kvc8")
    return recipe


def written(given: Settings, recipe: Recipe) -> dict[str, object]:
    """What changes what is written, as a run that goes on compares it."""
    every = {each.name: getattr(given, each.name) for each in fields(given)}
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in every.items()}
    return {"recipe": recipe, **{n: v for n, v in plain.items() if n not in (*HOW, "recipe")}}
