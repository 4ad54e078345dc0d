"""Rotated models compute what they did; shown in float64, where rounding hides no mistake."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools.quantizer.transforms.orthogonal import hadamard, random_orthogonal
from kvc8.tools.quantizer.transforms.rotation import (
    EMBEDDING,
    HEAD,
    Rotation,
    find_rotation,
    rotate,
    turned,
    untied_bytes,
)

TOKENS = torch.tensor([[5, 17, 90, 3, 44, 44, 101, 7, 8, 9, 60, 2]])


@pytest.mark.parametrize("size", [1, 2, 12, 64, 96, 576, 35])
def test_a_map_is_orthogonal_and_spreads(size):
    made = random_orthogonal(size, seed=3)
    matrix = made.turn(torch.eye(size, dtype=torch.float64))
    # log2(size) additions and m products of numbers below one, each rounded to 2**-53
    assert (matrix @ matrix.t() - torch.eye(size)).abs().max() < 2 * size * 2.0**-53 * 10
    power = size & -size
    assert matrix.abs().max() <= power**-0.5 + 1e-12  # no channel keeps more than its share
    scale = torch.linspace(0.5, 2, size, dtype=torch.float64)
    x = torch.linspace(-1, 1, 3 * size, dtype=torch.float64).view(3, size)
    assert torch.allclose(made.turn(x, scale), (x * scale) @ matrix, rtol=0, atol=1e-12)
    assert torch.equal(random_orthogonal(size, seed=3).turn(x), made.turn(x))


def test_the_hadamard_transform_is_its_matrix():
    rows = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(8)] for i in range(8)]
    matrix = torch.tensor(rows, dtype=torch.float64) * 8**-0.5
    x = torch.arange(48, dtype=torch.float64).view(2, 8, 3)
    assert torch.allclose(hadamard(x), matrix @ x, rtol=0, atol=1e-12)


def _norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    scale = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * (x * scale)


def logits(directory: Path, tensors: dict[str, torch.Tensor], tied: bool) -> torch.Tensor:
    config = AutoConfig.from_pretrained(directory, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)  # transformers' own rounds to float32
    missing, strange = model.load_state_dict(tensors, strict=False)
    assert (set(missing) <= ({HEAD} if tied else set()), strange) == (True, [])
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_size": 96, "head_dim": 24}),  # neither is a power of two
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize("residual", [True, False])
def test_a_rotated_model_computes_what_it_did(kind, config, tied, residual, tiny_model):
    directory = tiny_model(kind, tied=tied, **config)
    stored = {n: t.double() for n, t in load_file(directory / "model.safetensors").items()}
    rotation = find_rotation(open_checkpoint(directory), residual, seed=5)
    assert isinstance(rotation, Rotation)
    sources = {**stored, HEAD: stored[EMBEDDING]} if tied and residual else stored
    made = {name: turned(name, sources.__getitem__, rotation) for name in sources}
    want = logits(directory, stored, tied)
    got = logits(directory, made, tied and not residual)
    # Every sum in the model rounds to 2**-53 = 1e-16 of values near one. Four layers of norms and
    # softmaxes amplify that by a few powers of ten; a part that is not rotated changes digit one.
    assert (got - want).abs().max() < 1e-10
    changed = [name for name in stored if not torch.equal(made[name], stored[name])]
    ends = {name.split(".", 3)[-1] for name in changed if ".0." in name}
    assert ("self_attn.v_proj.weight" in ends, "mlp.up_proj.weight" in ends) == (True, residual)


def test_a_tied_head_is_untied_and_told(tiny_model, tmp_path):
    source = open_checkpoint(tiny_model("llama", tied=True))
    rotation = find_rotation(source, True, seed=0)
    assert isinstance(rotation, Rotation)
    made = rotate(source, rotation, tmp_path / "made")
    assert made.config["tie_word_embeddings"] is False
    assert untied_bytes(source, made) == 128 * 64 * 4
    assert made.path == source.path
    only_heads = find_rotation(source, False, seed=0)
    assert isinstance(only_heads, Rotation)
    heads = rotate(source, only_heads, tmp_path / "heads")
    assert (untied_bytes(source, heads), heads.config) == (0, source.config)


def test_what_is_not_known_stays_as_it_is(tiny_model, tmp_path):
    gemma = find_rotation(open_checkpoint(tiny_model("gemma3", tied=True)), True, seed=0)
    assert gemma == "model_type gemma3_text is not known to allow it"
    shutil.copytree(tiny_model("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.x.weight": torch.ones(2)}, tmp_path / "m/model.safetensors"
    )
    found = find_rotation(open_checkpoint(tmp_path / "m"), True, seed=0)
    assert found == "the model holds model.layers.0.x.weight"
