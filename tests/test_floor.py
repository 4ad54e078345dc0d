"""What an int8 cache costs at least: each form rounds as it says, and changes nothing else."""

import json
import math

import pytest
import torch

from kvc8.tools import bench
from kvc8.tools.benchmarks import floor
from kvc8.tools.quantizer.transforms.pairs import at_each_angle, best_turns, turn_pairs


def rows(seed=0):
    random = torch.Generator().manual_seed(seed)
    wide = torch.rand(2, 8, generator=random, dtype=torch.float64) * 9 + 0.5
    middle = torch.rand(2, 8, generator=random, dtype=torch.float64) * 4
    return torch.randn(50, 2, 8, generator=random, dtype=torch.float64) * wide + middle


def measured(x, side="k"):
    cache = floor.JudgedCache(side)
    floor.reach(cache, x)
    cache.power = at_each_angle(rows(1), lambda q: q.square().sum(0))
    floor.clip(cache, x)
    return cache


def test_scales_of_the_text_itself_clip_nothing():
    """A value is at most half a step off: (top / 127) / 2, but for float64's own rounding."""
    x = rows()
    cache = measured(x)
    half = cache.top / 254 * (1 + 1e-12)
    assert ((floor.minmax(cache, x) - x).abs() <= half).all()
    low, high = x.amin(0), x.amax(0)
    assert ((floor.k_with_offsets(cache, x) - x).abs() <= (high - low) / 508 * (1 + 1e-9)).all()


def test_the_least_error_is_at_most_that_of_the_whole_range():
    x = rows()
    cache = measured(x)
    cost = [(form(cache, x) - x).square().sum() for form in (floor.least_error, floor.minmax)]
    assert cost[0] <= cost[1]


def test_a_turn_of_pairs_of_q_and_k_changes_no_score():
    """In double precision: rounding of 8 products a score stays below 1e-12 of the largest."""
    q, k = rows(2), rows(3)
    angles = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    before = torch.einsum("thd,shd->hts", q, k)
    after = torch.einsum("thd,shd->hts", turn_pairs(q, angles), turn_pairs(k, angles))
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    assert torch.allclose(turn_pairs(turn_pairs(k, angles), -angles), k, rtol=1e-12, atol=1e-12)


def test_the_angle_has_the_least_cost_of_all():
    cache = measured(rows())
    turns = best_turns(cache.tops, cache.power)
    costs = (cache.tops.square() * cache.power).unflatten(-1, (2, -1)).sum(-2)
    assert (costs.gather(0, turns[None])[0] <= costs).all()
    assert torch.equal(cache.tops[0], cache.top)  # no turn is one of them


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_without_rounding_nothing_is_lost_and_all_forms_are_told(
    tiny_model, tmp_path, capsys, monkeypatch, kind
):
    text = tmp_path / "t.txt"
    text.write_text("The cache holds what the model has read, and no more. " * 30)
    args = [str(tiny_model(kind)), "--text", str(text), "--windows", "2", "--window", "32"]
    assert run(args, capsys)
    untouched = dict.fromkeys(floor.FORMS, lambda cache, x: x)
    monkeypatch.setattr(floor, "FORMS", untouched)
    assert {row["kl_mean"] for row in run(args, capsys)} == {0.0}


def run(args, capsys):
    given = bench.parser().parse_args(["floor", *args, "--threads", "1", "--json"])
    assert bench.work(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told) == 3 + 3 + 2 + 2 + 3 + 1
    assert all(math.isfinite(row["kl_mean"]) for row in told)
    return told
