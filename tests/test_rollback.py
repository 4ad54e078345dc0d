"""What quantizing a linear costs its layer, and which linears are left float for it."""

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.tools import command, quantize
from kvc8.tools.quantizer.options import _percent
from kvc8.tools.quantizer.sensitivity import LinearGroup, roll_back, table

OUTLIER = 300.0


def group(name: str, weights: int, error: float) -> LinearGroup:
    return LinearGroup([f"model.layers.{name}"], weights, error)


def test_the_worst_for_their_size_go_first_and_the_budget_holds():
    groups = [
        group("0.self_attn.q_proj", 40, 4.0),
        group("0.mlp.up_proj", 50, 10.0),
        group("1.self_attn.q_proj", 10, 0.5),
    ]

    def left_float(share):
        return [g.rolled_back for g in roll_back(groups, share)]

    assert left_float(0.0) == [False, False, False]
    assert left_float(0.09) == [False, False, False]
    assert left_float(0.1) == [False, False, True]  # the two that are worse do not fit
    assert left_float(0.49) == [True, False, False]
    assert left_float(0.6) == [False, True, True]  # 60 of 100, of which the first leaves 10
    assert left_float(0.9) == [True, True, False]
    assert left_float(1.0) == [True, True, True]


def test_the_map_has_a_row_a_layer_and_a_star_for_what_stays_float():
    groups = [
        LinearGroup([f"model.layers.0.self_attn.{x}_proj" for x in "qkv"], 3, 0.00123),
        group("0.mlp.up_proj", 1, 2.5e-6),
        LinearGroup(["model.layers.1.mlp.up_proj"], 1, 0.5, rolled_back=True),
    ]
    text = io.StringIO()
    Console(width=90, file=text).print(table(groups))
    lines = text.getvalue().splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if "│" in line]
    assert cells == [
        ["model.layers.0", "0.0012", "2.5e-06"],
        ["model.layers.1", "", "0.5 *"],
    ]
    [head] = [line for line in lines if line.startswith("┃")]
    names = [name.strip() for name in head[1:-1].split("┃")]
    assert names == ["* left float", "q_proj k_proj v_proj", "up_proj"]


def test_a_budget_is_a_percentage():
    assert [_percent(text) for text in ("0", "5", "2.5%", "100")] == [0.0, 5.0, 2.5, 100.0]
    for text in ("101", "-1", "a", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            _percent(text)
        assert str(caught.value) == f"{text!r} is no percentage; write 5 or 2.5"


@pytest.fixture
def planted(tiny_model, tmp_path) -> Path:
    """A model where what gate_proj and up_proj of layer 1 read has an outlier.

    The norm makes a channel that much larger and the weights make it smaller again, so that the
    model computes what it did, and a static int8 range has few steps left for the others.
    """
    directory = tmp_path / "planted"
    shutil.copytree(tiny_model("llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][0] *= OUTLIER
    for part in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{part}_proj.weight"][:, 0] /= OUTLIER
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.slow
def test_a_linear_that_hurts_is_found_and_left_float(planted, tmp_path, capsys):
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out"
    texts.write_text("".join(json.dumps({"text": f"words {i} of it"}) + "\n" for i in range(4)))
    given = [str(planted), "-o", str(out), "--calib-file", str(texts)]
    given += ["--rotate", "off", "--rollback", "15"]  # a layer's gate and up are a seventh
    assert command.entry(quantize.parser(), quantize.work, given) == 0
    assert "22 linears in W8A8, 6 float" in capsys.readouterr().out
    notes = json.loads((out / "quant_model_description.json").read_text())["kvc8"]
    worst = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    errors = notes["sensitivity"]
    assert notes["rollback_percent"] == 15
    assert notes["rolled_back"] == worst
    others = [error for module, error in errors.items() if module not in worst]
    assert len(errors) == 24
    assert errors[worst[0]] == errors[worst[1]] > 10 * max(others)
    found = open_checkpoint(out)
    assert found.warnings == ()
    assert set(found.w8a8) == set(errors) - set(worst)
    before = open_checkpoint(planted)
    for module in worst:
        name = f"{module}.weight"
        assert torch.equal(found.read(name), before.read(name))
    assert len(found.kv) == 4  # a layer keeps its scales
    program = capture(found, torch.float32)
    pipeline.run(program, pipeline.QUANTIZE)
