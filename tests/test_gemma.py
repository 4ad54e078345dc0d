"""Gemma 3 in small, by the commands: quantized, compiled, run and compared, as tools/demo does."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import write_model, write_tokenizer

from kvc8.backends.npu.launches import launches
from kvc8.ir.text import parse
from kvc8.tools import command, compile, inspect, quantize, run, verify

# A window shorter than the prompt in one layer of the two; bfloat16, as the real one is.
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
ALL = {"prefill", "chunk", "decode"}


def done(tool, *arguments: object) -> int:
    return command.entry(tool.parser(), tool.work, [str(each) for each in arguments])


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, quantized, compiled = (tmp_path / name for name in ("model", "w8a8c8", "npu"))
    model.mkdir()
    write_model(model, "gemma3", 0, LAYERS, torch.bfloat16)
    write_tokenizer(model)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"input_ids": [5, 17, 42, 99, 3, 64, 80, 23, 11, 9, 100]}) + "\n")
    assert done(quantize, model, "-o", quantized, "--calib-file", texts) == 0
    assert done(compile, quantized, "--target", "npu", "-o", compiled) == 0
    capsys.readouterr()

    programs = {phase: parse((compiled / f"{phase}.py").read_text()) for phase in ALL}
    assert all("npu_geglu" in each for p in programs.values() for each in launches(p).values())
    decode = launches(programs["decode"])
    assert [each.total() for each in decode.values()] == [16, 16]  # down_proj is float

    options = ["--prompt", "abcdefghijkl", "--max-new-tokens", 4, "--json"]
    assert run.main([str(each) for each in (compiled, *options)]) == 0
    assert 0 < len(json.loads(capsys.readouterr().out)["sequences"][0]["tokens"]) <= 4

    # Status 0 promises: with transformers and in ONNX Runtime the same to many digits in doubles.
    assert done(verify, "forms", quantized, "--tokens", 20, "--steps", 3, "--json") == 0
    said = capsys.readouterr().out
    for form in ("transformers f64", "ONNX Runtime f64", "NPU emulated bf16", "ONNX Runtime gqa"):
        assert f'"{form}"' in said

    assert done(inspect, quantized, "--json") == 0
    assert "compiles it as it is" in capsys.readouterr().out
