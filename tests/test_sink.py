"""The turn of V that takes first tokens to one channel, and the texts that widen ranges."""

import json

import pytest
import torch
from support.tiny_models import write_model
from support.turned import BOUND, TOKENS, turned

import kvc8
from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.program import argument
from kvc8.tools.quantizer import quantizing
from kvc8.tools.quantizer.calibration_data import Text
from kvc8.tools.quantizer.recipes.kinds_of_text import kinds_of_text
from kvc8.tools.quantizer.settings import Settings
from kvc8.tools.quantizer.transforms.sink import find_sinks, reflections, turn


def test_a_reflection_takes_a_row_to_the_first_channel():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 16, generator=random, dtype=torch.float64)
    rows[1] = 0  # nothing is known of it
    rows[2] = torch.eye(16, dtype=torch.float64)[0] * 5  # it is there already
    found = reflections(rows)
    turned = (found @ rows[:, :, None])[:, :, 0]
    wanted = torch.zeros(3, 16, dtype=torch.float64)
    wanted[:, 0] = rows.norm(dim=-1)
    # Some 3 * 16 products and sums of numbers below the row's norm, each rounded to 2**-53.
    assert (turned - wanted).abs().max() < 48 * 2.0**-53 * wanted.max()
    assert torch.equal(found[2], torch.eye(16, dtype=torch.float64))
    assert (found @ found - torch.eye(16)).abs().max() < 48 * 2.0**-53


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_a_turned_model_computes_what_it_did(kind, tiny_model):
    """With one linear a projection, with biases, and with q, k and v in one."""
    made = turned(
        tiny_model(kind),
        find_sinks,
        lambda site, seen, weights: turn(site, reflections(seen[site.rows][0]), weights),
    )
    for site in made.sites:
        rows, first = made.before[site.rows][0], made.after[site.rows][0]
        assert first[:, 1:].abs().max() < BOUND * first.abs().max()
        assert first[:, 0] == pytest.approx(rows.norm(dim=-1))
    keys = argument(made.program.calls(ops.cache_write)[0], 1)
    assert keys is not made.sites[0].rows  # and left alone


def test_what_bfloat16_would_round_is_left_alone(tmp_path):
    write_model(tmp_path, "llama", 0, {"num_hidden_layers": 2}, torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    program = capture(checkpoint, torch.float32)
    assert find_sinks(program, checkpoint, set()) == []
    layer = "model.layers.0.self_attn"
    assert len(find_sinks(program, checkpoint, {f"{layer}.v_proj", f"{layer}.o_proj"})) == 1


def test_kinds_of_text_widen_what_was_written_and_not_what_was_tokens():
    kinds = [text.content for text in kinds_of_text()]
    given = [Text("1", "a few words " * 10), Text("2", "", [5] * 99)]
    assert [text.content for text in quantizing._widening(given)][1:] == kinds
    assert quantizing._widening(given[1:]) == []
    assert all(
        part in "".join(kinds) for part in ("\n", "\t", "  ", "{", "===", "def ", "今", "🙂")
    )


def test_float_linears_are_written_as_they_were_turned(tiny_model, tmp_path):
    """The first layer's V of the directory, by its own weights, lies along the first channel."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"input_ids": TOKENS}) + "\n")
    source, out = tiny_model("qwen2", num_hidden_layers=1), tmp_path / "out"
    kvc8.quantize(
        source, out=out, calibration=tmp_path / "texts.jsonl", settings=Settings(disable=("*",))
    )
    found = open_checkpoint(out)
    for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight"):
        name = f"model.layers.0.self_attn.{name}"
        assert not torch.equal(found.read(name), open_checkpoint(source).read(name))
