"""Tiny models of real architectures with a C8 cache calibrated the vendor's way: before RoPE."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, object] = {
    **tiny_models.SIZES,
    **{"intermediate_size": 96, "num_hidden_layers": 2, "attention_dropout": 0.0},
}
TOKENS = 200


def write_pre_rope(directory: Path, kind: str, **config: object) -> list[Tensor]:
    """Write a C8-only ascendV1 directory; gives K after RoPE of each layer, [H, T, D].

    K scales are the largest magnitude that k_proj gave for a channel, over 127: what msModelSlim
    measures. What the layer caches is taken from transformers' own cache.
    """
    torch.manual_seed(0)
    whole = AutoConfig.for_model(kind, **{**SIZES, **config})
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        whole, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    _roughen(model)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(_note(seen, name))
    with torch.no_grad():
        tokens = torch.randint(3, 128, (1, TOKENS))
        cache = model(tokens, use_cache=True).past_key_values
    model.save_pretrained(directory)
    _add_scales(directory, seen)
    return [layer.keys[0] for layer in cache.layers]


def _roughen(model: torch.nn.Module) -> None:
    """Channels of K of very different sizes, as real models have them, and biases that count."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.weight"):
                parameter *= torch.exp(1.5 * torch.randn(parameter.shape[0], 1))
            elif name.endswith("k_proj.bias"):
                parameter += torch.randn(parameter.shape)


def _note(seen: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def hook(_module: object, _given: object, out: Tensor) -> None:
        seen[name] = out.flatten(0, -2).abs().amax(0)

    return hook


def _add_scales(directory: Path, seen: dict[str, Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    labels = dict.fromkeys(tensors, "FLOAT")
    for name, largest in seen.items():
        tensors[f"{name}.kv_cache_scale"] = (largest / 127).clamp(min=1e-6)
        labels[f"{name}.kv_cache_scale"] = "C8"
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "quant_model_weight_w8a8.safetensors")
    head = {"model_quant_type": "FLOAT", "kv_cache_type": "C8", "kv_quant_type": "C8"}
    (directory / "quant_model_description.json").write_text(json.dumps(head | labels))
