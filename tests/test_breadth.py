"""Every architecture that kvc8 captures computes what transformers computes.

A prompt and then tokens one by one out of the cache, through windows that are shorter than the
text: in float64 within the bound of tools/driver/faithful.py, and in float32 within 1e-5.
"""

from collections.abc import Mapping

import pytest
import torch
from support.steps import step, values

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.run import run
from kvc8.tools.driver.faithful import hold

TOKENS, PROMPT = [5, 17, 42, 99, 3, 64, 80, 23, 11, 71, 9, 100], 9
WINDOW = 4
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 101}
ALTERNATE = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64}

# By name: a model_type of transformers where it is not the name, and what its config has.
MODELS: Mapping[str, Mapping[str, object]] = {
    "afmoe": {
        **{**ALTERNATE, **EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
        "global_attn_every_n_layers": 2,
    },
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": ALTERNATE,
    "cohere2_moe": {**ALTERNATE, **EXPERTS},
    "cwm": ALTERNATE,
    "ernie4_5": {},
    "exaone4": ALTERNATE,
    "flex_olmo": EXPERTS,
    "gemma": {"head_dim": 8},
    "gemma2": {**ALTERNATE, "head_dim": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {**ALTERNATE, "head_dim": 8, "query_pre_attn_scalar": 16},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "granite_swa": ALTERNATE,
    "granitemoe_swa": {**ALTERNATE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hyperclovax": {},
    "internlm3": {"head_dim": 8},
    "iquestcoder": {},
    "jais2": {},
    "linear rope": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", **ROPE}},
    "llama": {},
    "llama3 rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3},
    },
    "ministral": {**ALTERNATE, "head_dim": 8},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": ALTERNATE,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {
        **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    },
    "qwen2_moe": {
        **{**EXPERTS, "shared_expert_intermediate_size": 16},
        **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    },
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {**ALTERNATE, "head_dim": 8, "query_pre_attn_scalar": 16},
    "yarn rope": {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", **ROPE}},
}
WINDOWED = {name for name, config in MODELS.items() if "sliding_window" in config}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_transformers_computes(name, tiny_model):
    config = dict(MODELS[name])
    directory = tiny_model(config.pop("model_type", name), **{**SMALL, **config})
    checkpoint = open_checkpoint(directory)
    program = capture(checkpoint, torch.float32)
    found = hold(checkpoint, program, TOKENS, steps=len(TOKENS) - PROMPT)
    assert found.problem is None
    windows = {call.args[7] for call in program.calls(ops.paged_attention)}
    assert (WINDOW in windows) == (name in WINDOWED)
    made, table = values(program, directory), [[7, 2, 11]]
    given = step(TOKENS[:PROMPT], [0], [PROMPT], table)
    logits, *caches = run(program, {**made, **given})
    assert close(logits, found.theirs[:PROMPT])
    for p in range(PROMPT, len(TOKENS)):
        made |= {cache.name: new for cache, new in zip(program.caches(), caches, strict=True)}
        given = step(TOKENS[p : p + 1], [p], [p + 1], table)
        logits, *caches = run(program, {**made, **given})
        assert close(logits, found.theirs[p : p + 1])
