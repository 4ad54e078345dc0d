"""The recipe kvc8: each choice it makes, and the models it gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.notes import of_float32
from support.steps import step, values

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.checkpoint.w8a8 import Range, nearest
from kvc8.ir.program import argument
from kvc8.ir.run import run
from kvc8.tools import command, quantize
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.quantizer.calibration_data import LINES, Text, with_lines
from kvc8.tools.quantizer.choices import CLIPS, Reach, Sample, _range_error, clipped
from kvc8.tools.quantizer.transforms.positions import Table, find_turning, hardly_turned, rows_at
from kvc8.tools.quantizer.transforms.rounding import compensated, error_shares

TEXTS = [
    "What is kept of a text is its keys and values.",
    "def f(x):\n    return x + 1",
    "Yes! No.",
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    return path


def quantize_(directory: Path, out: Path, texts: Path, *options: str) -> int:
    given = [str(directory), "-o", str(out), "--calib-file", str(texts), "--recipe", "kvc8"]
    return command.entry(quantize.parser(), quantize.work, [*given, *options])


def storages(table: Table) -> set[int]:
    """Where the tensors of a table lie in memory."""
    tensors = [x for x in table.values.values() if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr() for x in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_k_elsewhere_is_what_the_program_computes_there(kind, tiny_model):
    """In the first layer, where K is a function of token and position alone: bit for bit."""
    source = tiny_model(kind)
    checkpoint = open_checkpoint(source)
    program = capture(checkpoint, torch.float32)
    write = program.calls(ops.cache_write)[0]
    rows = argument(write, 1)
    turning = find_turning(rows)
    assert turning is not None
    made, tokens = values(program, source), list(range(40, 52))
    seen = {}

    def observe(node, value):
        seen[node] = value

    def at(start):
        given = step(tokens, [0], [len(tokens)], [list(range(8))])
        given["positions"] = given["positions"] + start
        run(program, {**made, **given}, observe)
        return seen[rows]

    want = torch.cat([at(start) for start in (100, 0, 7)])
    weights = {node: made[node.name] for node in turning.parameters}
    output, table = seen[turning.source], Table(112)
    got = rows_at(turning, output, (100, 0, 7), weights, checkpoint.read, table)
    assert torch.equal(torch.cat(list(got)), want)
    v_rows = argument(program.calls(ops.cache_write)[1], 1)
    assert find_turning(v_rows) is None
    # Another layer's cosines are views of these: none are held twice.
    second = find_turning(argument(program.calls(ops.cache_write)[2], 1))
    assert second is not None
    held = storages(table)
    table.fill(second, {node: made[node.name] for node in second.parameters})
    assert storages(table) == held


@pytest.mark.slow
def test_k_fits_at_the_end_of_the_whole_context_by_default(tiny_model, tmp_path):
    """In the first layer, of whose K a slow pair reaches far along one channel, as in real models.

    Over 4,096 tokens RoPE turns it by 1.3 radians, so that it reaches along the other channel.
    """
    source, texts = tmp_path / "float", tmp_path / "texts.txt"
    texts.write_text("The sea is a very large thing, and it has no end.\n")
    shutil.copytree(tiny_model("qwen2"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    tensors = load_file(source / "model.safetensors")
    heads = config["num_key_value_heads"]
    bias = tensors["model.layers.0.self_attn.k_proj.bias"].view(heads, -1)
    bias[:, bias.shape[1] // 2 - 1] = 40.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def top(name: str, *options: str) -> torch.Tensor:
        """The largest K that the first layer's codes stand for, of each channel."""
        out = tmp_path / name
        assert quantize_(source, out, texts, "--disable", "*", *options) == 0
        made = open_checkpoint(out)
        return made.read(made.kv[0][0].scale).float().flatten() * 127

    whole, short = top("whole"), top("short", "--positions", "16")
    assert torch.equal(top("more", "--positions", "9999"), whole)  # than the model has
    checkpoint = open_checkpoint(source)
    program = capture(checkpoint, torch.float32)
    rows = argument(program.calls(ops.cache_write)[0], 1)
    turning = find_turning(rows)
    assert turning is not None
    made, seen = values(program, source), {}
    tokens = read_tokenizer(source).encode(texts.read_text().strip())
    run(program, {**made, **step(tokens, [0], [len(tokens)], [list(range(16))])}, seen.__setitem__)
    weights = {node: made[node.name] for node in turning.parameters}
    last = (4096 - len(tokens),)
    [there] = rows_at(turning, seen[turning.source], last, weights, checkpoint.read, Table(4096))
    reach = there.flatten(1).abs().amax(0)
    assert (reach <= whole).all()
    assert (reach > 2 * short).any()


def test_compensated_rounding_changes_what_is_read_less():
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=random)
    x = torch.randn(500, 96, generator=random) @ mix  # channels that move together
    weight = torch.randn(40, 96, generator=random)
    scale = weight.abs().amax(1, keepdim=True) / 127

    def error(codes):
        return float(((codes * scale - weight) @ x.t()).square().sum())

    plain, better = nearest(weight, scale), compensated(weight, scale, error_shares(x.t() @ x))
    assert better.dtype is torch.int8
    assert error(better) < 0.7 * error(plain)
    # Where no channel tells of another there is nothing to make up for.
    assert torch.equal(compensated(weight, scale, error_shares(torch.eye(96))), plain)


def test_a_range_is_clipped_where_that_costs_less():
    random = torch.Generator().manual_seed(0)
    flat = torch.rand(4096, generator=random) * 2 - 1
    assert clipped(Range(-1.0, 1.0), flat) == Range(-1.0, 1.0)
    gauss = torch.randn(100_000, generator=random)
    seen = Range(float(gauss.min()) * 1.5, float(gauss.max()) * 1.5)
    found = clipped(seen, gauss)
    errors = {c: _range_error(Range(seen.low * c, seen.high * c), gauss) for c in CLIPS}
    assert found.high == seen.high * min(errors, key=errors.__getitem__) < seen.high
    assert clipped(Range(0.0, 0.0), torch.zeros(3)) == Range(0.0, 0.0)


def test_a_margin_is_what_texts_held_back_want():
    random = torch.Generator().manual_seed(0)
    rows = torch.tensor([1.0, -2.0]) * (torch.rand(500, 2, generator=random) * 2 - 1)
    rows[0] = torch.tensor([1.0, -2.0])
    reach = Reach()
    reach.add(
        [rows], 500, held_back=True
    )  # nothing came before it that it could be measured against
    assert (reach.margin().tolist(), reach.top.tolist()) == ([1.0, 1.0], [1.0, 2.0])
    reach.add([rows[:300] * 1.2, rows[300:] * 1.2], 500, held_back=True)
    # 1.2 holds it all with 1.2**2 of the rounding error; 1.15 clips 4 % of the rows by up to 4 %,
    # ten times as much as a step rounds.
    assert reach.margin().tolist() == pytest.approx([1.2, 1.2])
    floor = torch.tensor([1.1, 1.3])
    assert reach.margin(floor=floor).tolist() == pytest.approx([1.2, 1.3])
    assert reach.top.tolist() == pytest.approx([1.2, 2.4])
    seen = Reach()
    seen.add([torch.tensor([[1.0, 1.0]])], 1, held_back=False)
    seen.add([torch.tensor([[0.9, 1.5]])], 1, held_back=True)
    first, second = (seen.margin(torch.tensor(w))[0] for w in ([1.0, 0.0], [0.0, 1.0]))
    assert first < second == 1.5


def test_channels_that_rope_hardly_turns_are_told_from_others():
    angles = torch.tensor([0.0, 0.09, -0.09, 0.15, -0.15, 3.1])
    later = torch.cat([angles.cos() - angles.sin(), angles.sin() + angles.cos()])
    still = hardly_turned(torch.stack([torch.ones(12), later]))
    assert still.tolist() == [True, True, True, False, False, False] * 2


def test_a_text_of_one_line_is_broken_and_a_chat_is_not():
    long, chat = "a few words " * 10, [{"role": "user", "content": "b " * 100}]
    given = [Text("1", long), Text("2", "short\n\nlines"), Text("3", chat), Text("4", "", [5] * 99)]
    (broken,) = with_lines(given)
    assert broken.content == "\n".join(["a few words " * 4 + "a few words"] * 2)
    (whole,) = with_lines([Text("1", f"one\n\n{'x' * 61}")])
    assert whole.content == f"one\n\n{'x' * 60}\nx"
    (first,) = with_lines([Text("1", "x" * 1000)])  # 17 lines
    assert first.content == "\n".join(["x" * 60] * LINES)


def test_a_sample_is_even_over_texts():
    sample = Sample(3)
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        sample.add(torch.arange(start, stop).float().view(1, -1, 1))
    assert sample.values()[:, 0].tolist() == [0, 3, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_a_quantized_directory_is_whole(kind, tiny_model, texts, tmp_path, capsys):
    source = tiny_model(kind, tied=kind in ("llama", "gemma3"))
    capsys.readouterr()
    assert quantize_(source, tmp_path / "out", texts) == 0
    notes = capsys.readouterr().err.splitlines()
    found = open_checkpoint(tmp_path / "out")
    assert (found.warnings, found.kv_calibrated, len(found.w8a8)) == ((), "post-rope", 24)
    if kind == "gemma3":
        what = "has a residual stream that is not rotated (model.layers.0.post_attention_layernorm"
        what = f"{what} scales the channels of what is added to the residual stream)"
        assert notes == [f"note: {source}: {what}, so int8 costs it more", of_float32(source)]
    elif kind == "llama":
        what = "its lm_head is rotated apart from the embedding, 0.0 MB more"
        assert notes == [f"note: {source}: {what}", of_float32(source)]
        assert found.config["tie_word_embeddings"] is False
    else:
        assert notes == [of_float32(source)]
    program = capture(found, torch.float32)
    tokens = list(range(40, 60))
    given = step(tokens, [0], [20], [list(range(8))])
    got = run(program, {**values(program, tmp_path / "out"), **given})[0].log_softmax(-1)
    base = capture(open_checkpoint(source), torch.float32)
    want = run(base, {**values(base, source), **given})[0].log_softmax(-1)
    # The captured program has the int8 weights and nothing else of quantization. A wrong rotation
    # gives another model: these random ones then differ by a nat and more.
    assert float((want.exp() * (want - got)).sum(-1).mean()) < 0.01


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tiny_model, texts, tmp_path):
    source = tiny_model("llama", tied=True)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert quantize_(source, tmp_path / name, texts, "--seed", str(seed)) == 0
    a, b, c = ((tmp_path / x / "quant_model_weight_w8a8.safetensors").read_bytes() for x in "abc")
    assert a == b != c


@pytest.mark.slow
def test_the_cache_alone_leaves_the_stream_and_a_tied_head(tiny_model, texts, tmp_path, capsys):
    source = tiny_model("llama", tied=True)
    assert quantize_(source, tmp_path / "out", texts, "--disable", "*") == 0
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.config["tie_word_embeddings"] is True
    same = {n for n in before.tensors if torch.equal(before.read(n), after.read(n))}
    turned = {n.split(".")[-2] for n in before.tensors if n not in same}
    assert turned == {"q_proj", "k_proj", "v_proj", "o_proj"}
    capsys.readouterr()
    assert quantize_(source, tmp_path / "off", texts, "--rotate", "off") == 0
    what = "is not rotated (--rotate off), so int8 costs it more"
    assert capsys.readouterr().err.splitlines() == [f"note: {source}: {what}", of_float32(source)]
