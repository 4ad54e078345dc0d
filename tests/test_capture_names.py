"""Checkpoints under the names that their authors gave, and models whose code writes in place."""

import pytest
import torch
from safetensors.torch import save_file
from support.steps import step, values
from transformers import AutoModelForCausalLM

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.run import run

TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11]
EXPERTS = {
    **{"num_hidden_layers": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
}
LATENT = {
    **{"num_hidden_layers": 2, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
}
# What of each is special: names in its files, or a K that its code writes half by half.
MODELS = {
    "mixtral": EXPERTS,
    "ernie4_5_moe": {**EXPERTS, "moe_k": 2, "moe_layer_start_index": 1},
    "gpt_neox": {"num_hidden_layers": 2, "num_key_value_heads": 4},
    "deepseek_v3": {**EXPERTS, **LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "minicpm3": LATENT,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_what_transformers_computes_of_the_same_files(kind, tiny_model):
    model = tiny_model(kind, **MODELS[kind])
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        want = net(torch.tensor([TOKENS])).logits[0]
    program = capture(open_checkpoint(model), torch.float32)
    given = step(TOKENS, [0], [len(TOKENS)], [[0, 1, 2]])
    logits = run(program, {**values(program, model), **given})[0]
    assert float((logits - want).abs().max()) < 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.slow
def test_transformers_own_names_are_read_too(tiny_model, tmp_path):
    """Experts packed in one tensor, as transformers has them in memory, are the same program."""
    model = tiny_model("mixtral", **EXPERTS)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    packed = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    save_file(packed, tmp_path / "model.safetensors")
    given = step(TOKENS, [0], [len(TOKENS)], [[0, 1, 2]])
    found = []
    for directory in (model, tmp_path):
        program = capture(open_checkpoint(directory), torch.float32)
        found.append(run(program, {**values(program, directory), **given})[0])
    assert torch.equal(*found)
