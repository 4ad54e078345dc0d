"""Attention that kvc8 does not know all of is refused when a model is captured, by name."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from kvc8.ir.capture.attention import CausalMask, attention, make_mask
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelError

OTHER = "use a model whose attention kvc8 knows"
WHERE = "config.json: Identity"
Q, K = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
BEYOND = "lets a token see other tokens than those before it or a window of them"


@pytest.mark.parametrize(
    ("rule", "size", "window"),
    [
        (causal_mask_function, None, 0),
        (sliding_window_causal_mask_function(4), 4, 4),
        (and_masks(sliding_window_overlay(4), causal_mask_function), 4, 4),
        (sliding_window_causal_mask_function(5), 4, None),  # not the window that it says
        (and_masks(causal_mask_function, sliding_window_overlay(4)), 4, None),  # in another order
        (bidirectional_mask_function, None, None),
        (lambda batch, head, query, key: key <= query, None, None),
    ],
)
def test_a_mask_says_what_a_query_sees_or_that_it_is_something_else(rule, size, window):
    assert make_mask(mask_function=rule, local_size=size) == CausalMask(window)


def test_a_mask_of_a_sequence_with_a_past_is_something_else():
    assert make_mask(mask_function=causal_mask_function, kv_offset=3) == CausalMask(None)


@pytest.mark.parametrize(
    ("mask", "given", "sentence"),
    [
        (None, {}, f"{WHERE} is given no mask; {OTHER}"),
        (torch.ones(5, 5), {}, f"{WHERE} is given a mask of its model's own making; {OTHER}"),
        (CausalMask(None), {}, f"{WHERE} {BEYOND}; {OTHER}"),
        (
            CausalMask(0),
            {"sliding_window": 4},
            f"{WHERE} is told a window of 4 and its mask has no window; "
            "correct sliding_window and layer_types",
        ),
        (
            CausalMask(8),
            {"sliding_window": 4},
            f"{WHERE} is told a window of 4 and its mask has a window of 8; "
            "correct sliding_window and layer_types",
        ),
        (CausalMask(0), {"dropout": 0.1}, f"{WHERE} is called with dropout 0.1; {OTHER}"),
        (CausalMask(0), {"is_causal": False}, f"{WHERE} is called as not causal; {OTHER}"),
        (
            CausalMask(0),
            {"position_bias": torch.zeros(5)},
            f"{WHERE} tells attention position_bias, which kvc8 does not know; {OTHER}",
        ),
        (
            CausalMask(0),
            {"alibi": 0},
            f"{WHERE} tells attention alibi, which kvc8 does not know; {OTHER}",
        ),
    ],
)
def test_what_attention_does_not_do_is_refused(mask, given, sentence):
    with pytest.raises(ModelError) as refused:
        attention(torch.nn.Identity(), Q, K, K, mask, 0.25, **given)
    assert str(refused.value) == sentence


def test_sinks_that_are_not_passed_are_refused():
    module = torch.nn.Identity()
    module.sinks = torch.zeros(4)
    with pytest.raises(ModelError) as refused:
        attention(module, Q, K, K, CausalMask(0), 0.25)
    assert str(refused.value) == f"{WHERE} has sinks and does not pass them as s_aux; {OTHER}"


@pytest.mark.parametrize("window", [0, 3])
def test_what_says_nothing_is_taken(window):
    inert = {"position_ids": torch.zeros(5), "cu_seq_lens_q": None, "output_attentions": False}
    x = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = CausalMask(window)
    said, _ = attention(torch.nn.Identity(), x, x[:, :2], x[:, :2], mask, 0.25, **inert)
    plain, _ = attention(torch.nn.Identity(), x, x[:, :2], x[:, :2], mask, 0.25)
    assert torch.equal(said, plain)


LATENT = {
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16},
    **{"v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "topk_method": "greedy", "num_hidden_layers": 1},
}
REFUSED = {
    "deepseek_v2": (
        LATENT,
        "a DeepseekV2ForCausalLM computes with complex numbers, which neither ONNX nor an NPU has; "
        "use a model that rotates by sines and cosines",
    ),
    "jetmoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
        "a JetMoeForCausalLM makes sizes of what it computes, such as how many rows an expert "
        "gets; use a model that leaves them in tensors",
    ),
    "mamba": (
        {},
        "a MambaForCausalLM computes some numbers of tokens otherwise than others, as states need; "
        "use a model with attention in all layers",
    ),
    "doge": (
        {"keep_window_size": 4},
        f"a DogeForCausalLM computes with its attention mask; {OTHER}",
    ),
    "falcon": ({}, f"a falcon takes its attention from a table of its own; {OTHER}"),
    "gemma3": ({"use_bidirectional_attention": True}, f"Gemma3Attention {BEYOND}; {OTHER}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_compute_otherwise_are_refused_in_a_sentence(kind, tiny_model):
    config, what = REFUSED[kind]
    checkpoint = open_checkpoint(tiny_model(kind, **config))
    with pytest.raises(ModelError) as refused:
        capture(checkpoint)
    assert str(refused.value) == f"config.json: {what}"
