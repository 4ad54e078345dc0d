"""Tiny random models of every architecture that we care for, and a tokenizer for them."""

from collections.abc import Mapping
from pathlib import Path

import torch

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each kind is here for. A window of 8 is short enough for a short prompt to reach past it;
# heads of 32 make the projections wider than the model.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "qwen2": ("qwen2", {"head_dim": 16}),  # biases on q, k and v
    "qwen3": ("qwen3", {"head_dim": 32}),  # norms on q and k
    "qwen3_moe": (  # a router and four experts, of which each token takes two
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "glm4_moe": (  # groups of experts, a bias that only chooses, shared experts, a dense layer
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "minimax_m2": (  # stored as block_sparse_moe.experts.0.w1
        "minimax_m2",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
    ),
    "granitemoe": (  # stored with all experts in one
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (  # experts with biases, and weights that lie transposed
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


def write_model(
    directory: Path,
    kind: str,
    seed: int,
    config: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a random model: of a kind or model_type, what `config` has over the usual sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a test that reads stderr may be the first to want a model

    model_type, special = KINDS.get(kind, (kind, {}))
    whole = AutoConfig.for_model(model_type, **{**SIZES, **special, **config})
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        whole, dtype=torch.float32
    )
    # transformers starts biases at zero, norms at one and the rest near zero, and a pass that
    # forgets one of them would not be noticed. These keep every activation near one.
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * (0.5 if name.endswith("bias") else 0.2))
    model.to(dtype).save_pretrained(directory)


def write_tokenizer(directory: Path) -> None:
    """One token a character of ASCII, so that text can be given to a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A space and a line feed are written so by byte-level tokenizers.
    characters = ["Ġ", "Ċ", *map(chr, range(ord("!"), ord("~") + 1))]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SIZES["max_position_embeddings"],
    ).save_pretrained(directory)
