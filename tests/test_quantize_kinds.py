"""kvc8-quantize on models that are built otherwise than Llama is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.layouts import kv_widths
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.tools import command, inspect, quantize

TEXTS = [[5, 17, 42, 99, 3, 64], [80, 23, 11, 9, 100, 7, 55]]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": text}) + "\n" for text in TEXTS))
    return path


def quantized(model: Path, out: Path, texts: Path, *options: str) -> int:
    given = [str(model), "-o", str(out), "--calib-file", str(texts), *options]
    return command.entry(quantize.parser(), quantize.work, given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("olmo2", "minmax"), ("olmo2", "kvc8"), ("gpt2", "minmax"), ("gptj", "kvc8")],
)
def test_models_that_norm_later_or_name_their_sizes_otherwise(
    kind, recipe, tiny_model, tokens, tmp_path
):
    rotary = {"rotary_dim": 8} if kind == "gptj" else {}
    model = tiny_model(kind, num_hidden_layers=2, num_key_value_heads=4, **rotary)
    out = tmp_path / "out"
    assert quantized(model, out, tokens, "--recipe", recipe) == 0
    checkpoint = open_checkpoint(out)
    assert set(checkpoint.kv) == {0, 1}
    program = capture(checkpoint)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    assert set(lowered) == {"prefill", "chunk", "decode"}
    if kind == "olmo2" and recipe == "minmax":  # its first layer reads the embedding as it is
        stored = load_file(out / "quant_model_weight_w8a8.safetensors")
        table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        seen = table[torch.tensor([token for text in TEXTS for token in text])]
        scale = stored["model.layers.0.self_attn.q_proj.input_scale"]
        assert torch.allclose(scale, (seen.max() - seen.min()) / 255, rtol=2**-10)


@pytest.mark.slow
def test_tokens_need_no_tokenizer_and_texts_do(tiny_model, tokens, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", num_hidden_layers=2), model)
    for file in model.glob("tokenizer*"):
        file.unlink()
    for recipe in ("minmax", "kvc8"):
        assert quantized(model, tmp_path / recipe, tokens, "--recipe", recipe) == 0
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "abc"}\n')
    capsys.readouterr()
    assert quantized(model, tmp_path / "out", texts) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {place(model)}: its tokenizer cannot be read (")
    assert said.endswith("); copy the tokenizer's files there\n")


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 64),
        ({"n_layer": 2, "n_head": 4, "n_embd": 64}, 64),
        ({"n_layer": 2, "n_head": 4, "n_embd": 64, "multi_query": True}, 16),
        ({"n_layers": 2, "n_heads": 4, "d_model": 64}, 64),
    ],
)
def test_a_cache_is_as_wide_as_config_json_says_in_its_own_words(config, width):
    assert kv_widths(config, "config.json") == (width, width)


def test_the_words_of_older_models_are_those_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from kvc8.ir.checkpoint.layouts import ALSO

    for kind in ("gpt2", "gptj", "gpt_bigcode", "bloom", "codegen", "mpt", "gpt_neo"):
        for name, alias in CONFIG_MAPPING[kind].attribute_map.items():
            assert name not in ALSO or alias in ALSO[name], (kind, name, alias)


NO_FLOAT32 = (
    "model.layers.0.self_attn: npu_fused_infer_attention_score on ascend910b takes query dtype f16 "
    "or bf16, and this is f32 (op-plugin docs/zh/custom_APIs/torch_npu/"
    "npu_fused_infer_attention_score.md); compile with --dtype float16"
)
NO_SOFT_CAP = (
    "lower_paged_attention: rewrote nothing (attention_0 (model.layers.0.self_attn) left as it "
    "was: it caps its logits, which no attention op of the NPU does, and in other ops each step "
    "would make float copies of all pages); see the reasons"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gemma2", NO_SOFT_CAP),
        ("gpt_oss", NO_FLOAT32),
        ("qwen3_moe", NO_FLOAT32),
        ("llama", NO_FLOAT32),
    ],
)
def test_what_the_npu_refuses_is_said_of_its_runtimes(kind, why, tiny_model, capsys):
    """All are in float32, which is all that is wrong with the last three."""
    given = [str(tiny_model(kind)), "--json"]
    assert command.entry(inspect.parser(), inspect.work, given) == 0
    told = json.loads(capsys.readouterr().out)["runtimes"]["kvc8"]["outcome"]
    once = "compiles it once there are KV scales"
    assert told == f"{once}; compiles it for onnx, and not for npu: {why}"
