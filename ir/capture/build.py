"""The model of a checkpoint as transformers builds it, without data: all layers, or a few."""

import copy
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvc8.ir.capture import attention
from kvc8.ir.capture.foreign import FOREIGN, first_line, quiet
from kvc8.ir.capture.known import unknown
from kvc8.ir.capture.mixtures import experts
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError


def config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json says a model computes in; float32 where it says none."""
    name = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")) or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ModelError("config.json", f"dtype is {name}", "write float16, bfloat16 or float32")
    assert isinstance(dtype, torch.dtype)
    return dtype


def model_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The config as transformers reads it, without what describes quantization."""
    kind = str(checkpoint.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise unknown(kind)
    ours = ("quantization_config", "quantize", "auto_map")
    plain = {k: v for k, v in checkpoint.config.items() if k not in ours}
    try:
        found: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(plain)
        return found
    except FOREIGN as error:
        raise ModelError(
            "config.json", f"not one of a {kind} ({first_line(error)})", "correct it"
        ) from error


def build(
    config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode | None = None
) -> torch.nn.Module:
    """The model of a config, on a CPU that holds no data; `mode` is that of tensors it meets."""
    attention.register()
    ALL_EXPERTS_FUNCTIONS.register(attention.NAME, experts)
    try:
        # Weights without data are not given their first values; from_pretrained ties them so too.
        with mode or FakeTensorMode(allow_non_fake_inputs=True), quiet(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention.NAME,
                experts_implementation=attention.NAME,
                dtype=dtype,
            )
            model.tie_weights()
    except FOREIGN as error:
        name = f"a {config.model_type}"
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            what = f"{name} takes its attention from a table of its own"
            raise ModelError("config.json", what, attention.OTHER) from error
        what = f"{name} cannot be built ({first_line(error)})"
        do = "use a causal language model of transformers"
        raise ModelError("config.json", what, do) from error
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def reduced(
    model: torch.nn.Module, config: PretrainedConfig, path: str, chosen: Sequence[int]
) -> torch.nn.Module | None:
    """A model of the chosen layers only: the layers themselves, for what code decides by a layer's
    number (that the first three are dense, say) it would decide otherwise in a shorter model.

    None where a shorter model has no such list of layers.
    """
    small = build(_shorter(config, chosen), model.dtype, _mode(model))  # type: ignore[arg-type]
    kept = small.get_submodule(path)
    full = layers(model, path)
    if not isinstance(kept, torch.nn.ModuleList) or len(kept) != len(chosen):
        return None
    for at, i in enumerate(chosen):
        kept[at] = full[i]
    return small


def _mode(model: torch.nn.Module) -> FakeTensorMode:
    """The mode that a model was built in, which all tensors of a trace share."""
    parameter = next(model.parameters())
    assert isinstance(parameter, FakeTensor)
    return parameter.fake_mode


def layers_path(model: torch.nn.Module, config: PretrainedConfig) -> str:
    """Where the list of the layers stands, as "model.layers"; raises ModelError if nowhere."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers:
            return str(name)
    what = f"has no list of {config.num_hidden_layers} layers"
    raise ModelError("config.json", f"a {config.model_type} {what}", "its code is not supported")


def layers(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    """The layers, in order, of the list at `path`."""
    return list(model.get_submodule(path).children())


def _lists(config: PretrainedConfig) -> dict[str, list[object]]:
    """What a config says of each layer by itself, by name."""
    count, every = config.num_hidden_layers, vars(config).items()
    return {k: found for k, found in every if isinstance(found, list) and len(found) == count}


def of_each_layer(config: PretrainedConfig) -> list[tuple[str, ...]]:
    """For each layer what tells it from others, whether its modules know or only its model's code.

    The kind of its attention is of the second sort: the model chooses its mask by it.
    """
    lists = _lists(config).values()
    return [tuple(repr(found[i]) for found in lists) for i in range(config.num_hidden_layers)]


def _shorter(config: PretrainedConfig, chosen: Sequence[int]) -> PretrainedConfig:
    """The config of a model of the chosen layers only."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = len(chosen)
    for name, found in _lists(config).items():
        setattr(small, name, [found[i] for i in chosen])
    return small
