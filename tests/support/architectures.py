"""The architectures that kvc8 is tried on: a tiny config of each, by the width of its heads."""

from collections.abc import Mapping

Config = Mapping[str, object]

WINDOW = 4  # shorter than the texts
ALTERNATE = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def sizes(head: int) -> dict[str, object]:
    """Two layers of four heads."""
    return {
        **{"num_hidden_layers": 2, "hidden_size": 4 * head, "intermediate_size": 6 * head},
        **{"vocab_size": 101},
    }


def captured(head: int) -> dict[str, Config]:
    """Those that kvc8 captures.

    By name: a model_type of transformers where it is not the name, and what its config has.
    """
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * head}
    gpt = {"n_layer": 2, "n_embd": 4 * head, "n_head": 4, "n_inner": 6 * head, "n_positions": 64}
    gpt |= {"num_key_value_heads": 4}
    return {
        "afmoe": {
            **{**ALTERNATE, **experts, "num_dense_layers": 1, "num_shared_experts": 1},
            "global_attn_every_n_layers": 2,
        },
        "apertus": {},
        "arcee": {},
        "bitnet": {},
        "cohere": {},
        "cohere2": ALTERNATE,
        "cohere2_moe": {**ALTERNATE, **experts},
        "cwm": ALTERNATE,
        "ernie4_5": {},
        "exaone4": ALTERNATE,
        "flex_olmo": experts,
        "gemma": {"head_dim": head},
        "gemma2": {**ALTERNATE, "head_dim": head, "query_pre_attn_scalar": 2 * head},
        "gemma3_text": {**ALTERNATE, "head_dim": head, "query_pre_attn_scalar": 2 * head},
        "glm": {"head_dim": head},
        "glm4": {"head_dim": head},
        "gpt2": gpt,
        "gpt_bigcode": {**gpt, "num_key_value_heads": 1},
        "gptj": {**gpt, "rotary_dim": head // 2},
        "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
        "granite_swa": ALTERNATE,
        "granitemoe_swa": {**ALTERNATE, "num_local_experts": 4, "num_experts_per_tok": 2},
        "helium": {"head_dim": head},
        "hunyuan_v1_dense": {"head_dim": head},
        "hyperclovax": {},
        "internlm3": {"head_dim": head},
        "iquestcoder": {},
        "jais2": {},
        "linear rope": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", **ROPE}},
        "llama": {},
        "llama3 rope": {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3},
        },
        "ministral": {**ALTERNATE, "head_dim": head},
        "ministral3": {"head_dim": head},
        "mistral": {"sliding_window": WINDOW},
        "nanochat": {},
        "nemotron": {},
        "olmo": {},
        "olmo2": {},
        "olmo3": ALTERNATE,
        "olmoe": experts,
        "opt": {
            **{"ffn_dim": 6 * head, "word_embed_proj_dim": 4 * head},
            "num_key_value_heads": 4,
        },
        "phi": {},
        "phi3": {"sliding_window": WINDOW},
        "qwen2": {
            **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        },
        "qwen2_moe": {
            **{**experts, "shared_expert_intermediate_size": 2 * head},
            **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        },
        "qwen3": {"head_dim": head},
        "qwen3_moe": {**experts, "head_dim": head},
        "seed_oss": {"head_dim": head},
        "smollm3": {"no_rope_layers": [1, 0]},
        "stablelm": {},
        "starcoder2": {"sliding_window": WINDOW},
        "vaultgemma": {**ALTERNATE, "head_dim": head, "query_pre_attn_scalar": 2 * head},
        "yarn rope": {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", **ROPE}},
    }


def others(head: int) -> dict[str, Config]:
    """Those that are tried only for the table of docs/models.md (tests/models_table.py)."""
    routed = {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * head},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    }
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    latent = {
        **{"kv_lora_rank": 8 * head, "q_lora_rank": 2 * head, "qk_rope_head_dim": head},
        **{"qk_nope_head_dim": 2 * head, "v_head_dim": 2 * head, "num_key_value_heads": 4},
    }
    return {
        "bloom": {"n_layer": 2, "n_head": 4},
        "codegen": {
            **{"n_layer": 2, "n_embd": 4 * head, "n_head": 4, "rotary_dim": head // 2},
            "num_key_value_heads": 4,
        },
        "deepseek_v2": {**routed, **latent, "topk_method": "greedy"},
        "deepseek_v3": {**routed, **latent},
        "doge": {},
        "dots1": routed,
        "ernie4_5_moe": {
            **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 2 * head},
            **{"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        },
        "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
        "glm4_moe": {**routed, "head_dim": head},
        "gpt_neo": {
            **{"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
            "window_size": WINDOW,
        },
        "gpt_neox": {"num_key_value_heads": 4},
        "gpt_oss": {**local, "head_dim": head, "sliding_window": WINDOW},
        "granitemoe": local,
        "granitemoeshared": {**local, "shared_intermediate_size": 2 * head},
        "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": head},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "jetmoe": {**local, "kv_channels": head},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "llama4_text": {
            **{**local, "head_dim": head, "intermediate_size_mlp": 6 * head},
            "interleave_moe_layer_step": 1,
        },
        "mamba": {},
        "minicpm3": latent,
        "minimax_m2": {**local, "head_dim": head, "rotary_dim": head},
        "mixtral": local,
        "persimmon": {"num_key_value_heads": 4},
        "phimoe": local,
        "xglm": {
            "d_model": 4 * head,
            "ffn_dim": 6 * head,
            "num_layers": 2,
            "attention_heads": 4,
            "num_key_value_heads": 4,
        },
    }
