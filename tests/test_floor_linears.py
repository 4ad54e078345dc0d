"""What a W8A8 directory loses by parts: each form rounds as it says, and only what it says."""

import json

import pytest
import torch

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools import bench, command, quantize
from kvc8.tools.benchmarks import floor_linears as forms
from kvc8.tools.benchmarks.floor import CacheProbe, JudgedCache


def values():
    random = torch.Generator().manual_seed(0)
    wide = torch.rand(24, generator=random) * 9 + 0.5
    return torch.randn(64, 24, generator=random) * wide + 1


def judged(x):
    read = forms.JudgedInput((torch.tensor([0.11]), torch.tensor([-7.0])))
    assert forms.see(read, x) is x
    return read


def test_as_made_is_what_our_ops_compute():
    """Bit for bit: both divide, add, round and clamp in float32."""
    x = values()
    read = judged(x)
    codes = ops.quantize(x, *read.stored)
    assert codes.min() == -128  # some are clipped
    assert torch.equal(forms.as_made(read, x), ops.dequantize(codes, *read.stored, torch.float32))


def test_ranges_of_the_text_clip_nothing():
    """A value is half a step of (high - low) / 255 off, and one more where the offset is rounded.

    The offset moves the last code by at most half a step; float32 rounds codes to 2**-16 of a step.
    """
    x = values()
    step = (x.max() - x.min()) / 255
    assert (forms.by_range(judged(x), x) - x).abs().max() <= step * (1 + 2**-14)


def test_the_least_error_is_at_most_that_of_the_whole_range():
    """On the rows that it is chosen on."""
    x = values()
    read = judged(x)
    seen = read.sample.values()
    cost = [
        (form(read, seen) - seen).square().sum() for form in (forms.least_error, forms.by_range)
    ]
    assert len(seen) == len(x) // forms.EVERY
    assert cost[0] <= cost[1]


def test_by_token_is_half_a_step_of_each_token_off():
    x = values()
    half = x.abs().amax(-1, keepdim=True) / 254
    assert ((forms.by_token(judged(x), x) - x).abs() <= half * (1 + 2**-14)).all()


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    source, out = tiny_model("qwen2", num_hidden_layers=2), tmp_path_factory.mktemp("w") / "made"
    texts = out.parent / "texts.jsonl"
    texts.write_text(json.dumps({"input_ids": [5, 17, 42, 99, 3, 64, 80, 23, 11]}) + "\n")
    given = [str(source), "-o", str(out), "--calib-file", str(texts), "--recipe", "minmax"]
    assert command.entry(quantize.parser(), quantize.work, given) == 0
    return source, out


def test_all_that_int8_linears_read_is_found(made):
    checkpoint = open_checkpoint(made[1])
    probe = forms.InputProbe()
    probe.put(capture(checkpoint, torch.float32), checkpoint)
    assert len(checkpoint.inputs) == 2 * 6
    assert len(probe.inputs) == 2 * 3  # q, k and v read one value, gate and up another
    stored = {tuple(map(float, read.stored)) for read in probe.inputs.values()}
    names = checkpoint.inputs.values()
    assert stored == {tuple(float(checkpoint.read(name)) for name in pair) for pair in names}


def test_a_cache_is_rounded_by_its_stored_scales(made):
    checkpoint = open_checkpoint(made[1])
    through, caches = forms.stored_cache(checkpoint), CacheProbe()
    caches.put(capture(checkpoint, torch.float32))
    assert set(caches.caches) == {f"{side}_cache_{i}" for side in "kv" for i in range(2)}
    width = len(checkpoint.read(checkpoint.kv[1][0].scale))
    rows = torch.randn(9, 2, width // 2, generator=torch.Generator().manual_seed(1))
    scale = checkpoint.read(checkpoint.kv[1][0].scale).float()
    codes = ops.quantize(rows.flatten(1), scale, None)
    wanted = ops.dequantize(codes, scale, None, torch.float32).view_as(rows)
    assert torch.equal(through(JudgedCache("k_cache_1"), rows), wanted)
    assert through(JudgedCache("k_cache_7"), rows) is rows  # a float one


@pytest.mark.slow
def test_each_part_is_told_apart_and_without_rounding_weights_are_left(
    made, tmp_path, capsys, monkeypatch
):
    text = tmp_path / "t.txt"
    text.write_text("The cache holds what the model has read, and no more. " * 30)
    source, out = made
    args = [str(source), "--w8a8", str(out), "--text", str(text), "--windows", "2"]
    found = run([*args, "--window", "32"], capsys)
    assert len(set(found.values())) == len(found) == 7
    assert all(0 < kl < 1 for kl in found.values())
    monkeypatch.setattr(forms, "rounded", lambda x, *_: x)
    assert run([*args, "--window", "32"], capsys)["as made", "wac"] == found["as made", "w"]


def run(args, capsys):
    given = bench.parser().parse_args(["floor", *args, "--threads", "1", "--json"])
    assert bench.work(given) == 0
    told = json.loads(capsys.readouterr().out)
    return {(row["scales"], row["rounded"]): row["kl_mean"] for row in told}
