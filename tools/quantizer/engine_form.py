"""How each engine wants a W8A8 + C8 directory to be: its files, its settings, the dtypes in it.

                        vllm-ascend                    mindie
    description         quant_model_description.json   quant_model_description_w8a8.json
    config.json         no quantization_config, or     quantization_config: kv_quant_type C8,
                        the description is not read    and what transformers 4 looks for
    fa_quant_type       left out: null switches        null in config.json
                        another cache format on
    input_offset        int8, as its parameter is      of config.json's dtype
    KV scales, offsets  of config.json's dtype         of config.json's dtype

deq_scale is int64 holding a float32's bits in a float16 model, and float32 in a bfloat16 model, for
both. vllm-ascend copies a tensor into its parameter whatever dtype it has, bits as numbers. Read in
vllm-ascend 0.23.0 (quantization/modelslim_config.py, methods/w8a8_static.py, methods/kv_c8.py) and
182b75ea, MindIE-LLM 8b4871a (models/base/router.py), and the vendor's page on KV Cache int8.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from kvc8.ir.checkpoint.msmodelslim import NAME, OLD_NAME
from kvc8.ir.errors import ModelError
from kvc8.tools.quantizer.engines import NAMES, PACKED, Engine
from kvc8.tools.quantizer.writer import Entry

DESCRIPTIONS: Mapping[Engine, str] = {"vllm-ascend": NAME, "mindie": f"{OLD_NAME}w8a8.json"}
SERVED = (torch.float16, torch.bfloat16)  # what engines on an NPU compute in


def check_dtype(dtype: torch.dtype, where: str, engine: Engine) -> None:
    """Raise ModelError, at `where`, unless the engine computes in the dtype of config.json."""
    if dtype not in SERVED:
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            where,
            f"says {name}, in which {NAMES[engine]} does not compute",
            "convert the model to float16 or bfloat16",
        )


def check_labels(labels: Mapping[str, str], engine: Engine) -> None:
    """Raise ModelError where linears that an engine packs into one are not of one kind."""
    for name in labels:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        for group in PACKED:
            if last != group[0] or not name.endswith(".weight"):
                continue
            kinds = {part: labels.get(f"{module}.{part}.weight") for part in group}
            if len(set(kinds.values()) - {None}) > 1:
                said = ", ".join(f"{part} {kind}" for part, kind in kinds.items())
                raise ModelError(
                    module,
                    f"is {said}, and {NAMES[engine]} packs them into one linear",
                    "quantize all of them or none",
                )


def entry_for(entry: Entry, dtype: torch.dtype, engine: Engine) -> Entry:
    """A tensor as the engine's parameter has it, in a model of `dtype`.

    What W8A8_DYNAMIC and W8A8_MIX store stays as msModelSlim writes it.
    """
    if entry.label not in ("W8A8", "C8", "FLOAT"):
        return entry
    part = entry.name.rpartition(".")[2]
    deq_scale = torch.float32 if dtype is torch.bfloat16 else torch.int64
    offset = torch.int8 if engine == "vllm-ascend" else dtype
    wanted = {
        **dict.fromkeys(("kv_cache_scale", "kv_cache_offset"), dtype),
        **dict.fromkeys(("weight_scale", "weight_offset", "input_scale"), dtype),
        **{"input_offset": offset, "deq_scale": deq_scale},
        "bias": dtype,  # m3 writes a norm's as float32, and the newer msModelSlim a linear's
    }.get(part, entry.dtype)
    return Entry(entry.name, wanted, entry.shape, entry.label)


def entries_for(entries: Sequence[Entry], dtype: torch.dtype, engine: Engine) -> list[Entry]:
    """All tensors as the engine wants them; raises ModelError for what it cannot pack."""
    check_labels({entry.name: entry.label for entry in entries}, engine)
    return [entry_for(entry, dtype, engine) for entry in entries]


def description_for(
    engine: Engine, labels: Iterable[tuple[str, str]], notes: Mapping[str, object]
) -> dict[str, object]:
    """The description: a label for each tensor, and settings that the engine does not misread."""
    found = dict(labels)
    head: dict[str, object] = {"version": "1.0.0"} if engine == "vllm-ascend" else {}
    head["model_quant_type"] = kind_of(found.values())
    if "C8" in found.values():
        head |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    return {**head, **found, **({"kvc8": dict(notes)} if notes else {})}


def kind_of(labels: Iterable[str]) -> str:
    """The label that msModelSlim gives the whole: of several, the one it puts first."""
    order, given = ("W8A8", "W8A8_MIX", "W8A8_DYNAMIC"), set(labels)
    return next((label for label in order if label in given), "FLOAT")


def config_for(
    engine: Engine, config: Mapping[str, object], labels: Iterable[str]
) -> dict[str, object]:
    """config.json for the engine, of a model with these labels."""
    given = set(labels)
    kind = kind_of(given)
    found = {**config, "quantize": "w8a8" if kind == "FLOAT" else kind.lower()}
    found.pop("quantization_config", None)
    if engine == "vllm-ascend":
        return found
    if "C8" in given:
        kinds = {"kv_quant_type": "C8", "fa_quant_type": None, "group_size": 0}
        found["quantization_config"] = kinds
    return {**found, **_transformers_4(found)}


def _transformers_4(config: Mapping[str, object]) -> dict[str, object]:
    """What transformers 5 writes under another name; its own reader takes the old ones too."""
    old: dict[str, object] = {}
    if "dtype" in config and "torch_dtype" not in config:
        old["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return old  # models with two kinds of layers have two of them, and MindIE none of these
    old["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {name: rope[name] for name in rope if name != "rope_theta"}
    return old
