"""The turn of RoPE's slow pairs of q and k, for finer steps of K."""

import json
import math

import pytest
import torch
from support.tiny_models import write_model
from support.turned import BOUND, TOKENS, turned

import kvc8
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools.quantizer.settings import Settings
from kvc8.tools.quantizer.transforms.pairs import (
    ANGLES,
    at_each_angle,
    best_turns,
    find_pairs,
    turn,
    turn_pairs,
)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_of_turned_pairs_computes_what_it_did(kind, tiny_model):
    """Its keys are turned, by angles that differ by head and pair."""
    random, angles = torch.Generator().manual_seed(0), {}

    def change(site, _, weights):
        angles[site.keys] = torch.rand(site.heads, site.dim // 2, generator=random)
        turn(site, angles[site.keys], weights)

    made = turned(tiny_model(kind), find_pairs, change)
    for rows, by in angles.items():
        wanted = turn_pairs(made.before[rows], by.double())
        assert (made.after[rows] - wanted).abs().max() < BOUND * wanted.abs().max()


def test_what_reaches_far_in_one_channel_is_shared_by_both():
    """Of keys and queries along one channel, half of each square comes to lie in each of two."""
    rows = torch.zeros(3, 1, 4)
    rows[:, 0, 0] = torch.tensor([1.0, -3.0, 2.0])
    rows[:, 0, 1] = rows[:, 0, 3] = 1.0  # this pair is shared already
    tops = at_each_angle(rows, lambda x: x.abs().amax(0))
    power = at_each_angle(rows, lambda x: x.square().sum(0))
    found = best_turns(tops, power)
    assert found.tolist() == [[ANGLES // 2, 0]]
    cost = (tops.square() * power)[:, 0]
    halved = cost[ANGLES // 2, 0] + cost[ANGLES // 2, 2]
    assert float(halved) == pytest.approx(float(cost[0, 0] + cost[0, 2]) / 2)


@pytest.mark.parametrize("kind", ["qwen3", "phi3"])
def test_norms_of_keys_and_fused_linears_are_left_alone(kind, tiny_model):
    checkpoint = open_checkpoint(tiny_model(kind))
    assert find_pairs(capture(checkpoint, torch.float32), checkpoint, set()) == []


def test_pairs_that_bfloat16_would_round_are_left_alone(tmp_path):
    write_model(tmp_path, "llama", 0, {"num_hidden_layers": 2}, torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    program = capture(checkpoint, torch.float32)
    assert find_pairs(program, checkpoint, set()) == []
    layer = "model.layers.0.self_attn"
    assert len(find_pairs(program, checkpoint, {f"{layer}.q_proj", f"{layer}.k_proj"})) == 1


def test_only_slow_pairs_are_turned_and_none_with_offsets(tiny_model, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"input_ids": TOKENS}) + "\n")
    source = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=64)
    made = []
    for offsets in (False, True):
        out, settings = tmp_path / str(offsets), Settings(disable=("*",), k_offsets=offsets)
        kvc8.quantize(source, out=out, calibration=tmp_path / "texts.jsonl", settings=settings)
        made.append(open_checkpoint(out))
    before = open_checkpoint(source)
    site = find_pairs(capture(before, torch.float32), before, set())[0]
    fast = 64 * 10000.0 ** (-torch.arange(0, site.dim, 2) / site.dim) >= math.pi  # Llama's RoPE
    assert 0 < fast.sum() < len(fast)
    for name in site.stored():
        was, turned, offset = (one.read(name) for one in (before, *made))
        moved = (turned != was).unflatten(0, (-1, 2, site.dim // 2)).any(-1).any(1).any(0)
        assert not moved[fast].any()
        assert moved[~fast].any()
        assert torch.equal(offset, was)
