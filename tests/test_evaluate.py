"""What kvc8-evaluate says: its figures against plain formulas, for every form of a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.steps import step, values
from transformers import AutoModelForCausalLM

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.run import run
from kvc8.passes.options import Options
from kvc8.tools import command, compile, evaluate
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.evaluator import evaluating, forms
from kvc8.tools.evaluator.divergence import ROWS, Figures
from kvc8.tools.evaluator.forms import Setup, open_float, open_form
from kvc8.tools.evaluator.plot import AROUND, smoothed
from kvc8.tools.evaluator.windows import windows_of

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
QUANTIZED = CHECKPOINTS / "llama_fp16_m3" / "quant"
TEXT = "The cache keeps what was said, in int8; this is text enough for windows of some tokens. "
FLAVORS = ("standard", "gqa", "lowered")
FLOAT32 = Setup(torch.float32, Options(), float_cache=False)


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    given = [str(argument) for argument in arguments]
    status = command.entry(evaluate.parser(), evaluate.work, given)
    return status, *capsys.readouterr()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_figures_are_those_of_the_plain_formulas():
    random = torch.Generator().manual_seed(0)
    figures, expected = Figures(), []
    for _ in range(2):
        count = 2 * ROWS + 5
        model, reference = (torch.randn(count, 50, generator=random) * 3 for _ in range(2))
        tokens = torch.randint(50, (count,), generator=random)
        figures.add(model, reference, tokens)
        ours, theirs = (x.double().log_softmax(-1)[:-1] for x in (model, reference))
        loss = torch.nn.functional.nll_loss(ours, tokens[1:], reduction="none")
        kl = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        expected.append((loss, kl, ours.argmax(-1) == theirs.argmax(-1)))
    loss, kl, same = (torch.cat(part) for part in zip(*expected, strict=True))
    # A log probability is at most 25 here and rounded in float32 a few times: 25 * 2**-24 each;
    # the terms of a divergence add up to it with weights of sum one.
    bound = 4 * 25 * 2.0**-24
    assert figures.perplexity == pytest.approx(float(loss.mean().exp()), rel=bound)
    assert figures.kl_mean == pytest.approx(float(kl.mean()), abs=bound)
    assert figures.kl_p99 == pytest.approx(float(kl.quantile(0.99)), abs=bound)
    assert figures.top1 == float(same.double().mean())
    assert figures.kl_by_position.shape == (2 * ROWS + 4,)
    late = figures.between(100, 2 * ROWS + 5)  # of both windows, each of which has 2 * ROWS + 4
    kept = [torch.cat([part[100:] for part in x.chunk(2)]) for x in (loss, kl)]
    assert late.perplexity == pytest.approx(float(kept[0].mean().exp()), rel=bound)
    assert late.kl_mean == pytest.approx(float(kept[1].mean()), abs=bound)


@pytest.mark.parametrize(
    ("window", "cut"),
    [
        (24, [(0, 24)]),
        (1025, [(0, 1025)]),
        (1026, [(0, 1024), (1024, 1026)]),
        (8192, [(0, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]),
    ],
)
def test_a_window_is_cut_where_its_context_doubles(window, cut):
    assert evaluating.spans(window) == cut


def test_chunks_of_a_window_give_what_the_whole_gives(tiny_model, text, monkeypatch):
    source = tiny_model("qwen2")
    tokens = read_tokenizer(source).encode(TEXT)[:24]
    whole = open_float(source, 24).logits(tokens)
    monkeypatch.setattr(forms, "CHUNK", 9)
    # Two layers have 15 sums of at most 64 terms, which may be taken in another order in float32.
    bound = 15 * 64 * 2.0**-24 * float(whole.abs().max())
    assert (open_float(source, 24).logits(tokens) - whole).abs().max() <= bound


@pytest.mark.slow
def test_figures_by_position_make_up_the_whole(text, capsys, monkeypatch):
    monkeypatch.setattr(evaluating, "NEAR", 6)
    options = ("--against", QUANTIZED.parent / "orig", "--text", text, "--windows", 1)
    status, said, _ = ran(capsys, QUANTIZED, *options, "--window", 24, "--json")
    assert status == 0
    [row] = json.loads(said)["models"]
    parts = row["by_position"]
    assert [(part["start"], part["stop"]) for part in parts] == [(0, 6), (6, 12), (12, 24)]
    counted = [part["kl_mean"] * size for part, size in zip(parts, (6, 6, 11), strict=True)]
    assert sum(counted) / 23 == pytest.approx(row["kl_mean"])
    status, said, _ = ran(capsys, QUANTIZED, *options, "--window", 24)
    assert "KL, mean, and change of perplexity by position" in said
    assert f"{parts[2]['kl_mean']:.5f} {parts[2]['perplexity_change']:+.2%}" in said


@pytest.mark.slow
def test_the_float_model_against_itself_and_transformers(tiny_model, text, capsys):
    source = tiny_model("qwen2")
    options = ("--against", source, "--text", text, "--windows", 2, "--window", 24, "--json")
    status, said, err = ran(capsys, source, *options)
    assert (status, err) == (0, "")
    found = json.loads(said)
    assert found["tokens"] == 2 * 23
    [row] = found["models"]
    assert (row["kind"], row["kl_mean"], row["top1_agreement"]) == ("float", 0.0, 1.0)
    assert row["perplexity"] == found["float"]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.tensor(read_tokenizer(source).encode(TEXT)[:48]).view(2, 24)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    # transformers computes the same float32 sums in another order; no quantizer amplifies that.
    assert found["float"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The quantized golden model in every form there is."""
    folder = tmp_path_factory.mktemp("forms")
    for name in ("npu", *FLAVORS):
        target = ("npu",) if name == "npu" else ("onnx", "--flavor", name)
        out = ("-o", str(folder / name), "--dtype", "float16" if name == "npu" else "float32")
        given = [str(QUANTIZED), "--target", *target, *out]
        assert command.entry(compile.parser(), compile.work, given) == 0
    return {"directory": QUANTIZED, **{name: folder / name for name in ("npu", *FLAVORS)}}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["directory", "npu", *FLAVORS])
def test_each_window_is_a_prompt_of_its_own(form, compiled):
    """No window sees the one before it, and a token's logits depend on no later token."""
    opened = open_form(compiled[form], FLOAT32, 24)
    tokens = list(range(40, 64))
    first = opened.logits(tokens)
    assert first.shape[0] == 24
    opened.logits([7] * 24)
    assert torch.equal(opened.logits(tokens), first)
    other = opened.logits([*tokens[:12], *[7] * 12])
    if form == "directory":  # elsewhere a sum over other rows may be taken in another order
        assert torch.equal(other[:12], first[:12])
    assert not torch.equal(other[12:], first[12:])


def test_each_window_begins_as_the_tokenizer_begins_a_text(tiny_model, text, tmp_path):
    whole = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tokens = read_tokenizer(whole).encode(TEXT)
    assert windows_of(text, whole, 3, 10) == [tokens[:10], tokens[10:20], tokens[20:30]]
    written = json.loads((whole / "tokenizer.json").read_text())
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    first = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": parts, "pair": parts}
    (whole / "tokenizer.json").write_text(
        json.dumps({**written, "post_processor": {**template, "special_tokens": first}})
    )
    windows = [[1, *tokens[start : start + 9]] for start in (0, 9, 18)]
    assert windows_of(text, whole, 3, 10) == windows


@pytest.mark.slow
def test_all_forms_in_one_table(compiled, text, capsys):
    source = CHECKPOINTS / "llama_fp16_m3" / "quant"
    options = ("--against", source, "--text", text, "--windows", 1, "--window", 32)
    status, said, _ = ran(capsys, *compiled.values(), *options)
    assert status == 0
    kinds = ("float", "reference", "NPU, emulated", "ONNX Runtime, gqa", "ONNX Runtime, lowered")
    assert all(kind in said for kind in kinds)
    assert said.endswith("they were not verified on a device\n")


@pytest.mark.slow
def test_a_float_cache_leaves_what_w8a8_costs(compiled):
    opened = open_form(QUANTIZED, Setup(torch.float32, Options(), float_cache=True), 16)
    assert opened.kind == "reference, float cache"
    whole = open_form(QUANTIZED, FLOAT32, 16)
    alone = open_float(QUANTIZED, 16)
    tokens = list(range(40, 56))
    got = [form.logits(tokens) for form in (opened, whole, alone)]
    assert len({float(logits.sum()) for logits in got}) == 3
    program = capture(open_checkpoint(QUANTIZED), torch.float32)
    given = step(tokens, [0], [16], [list(range(4))])
    assert torch.equal(got[2], run(program, {**values(program, QUANTIZED), **given})[0])


def test_what_cannot_be_evaluated(tiny_model, text, tmp_path, capsys):
    source = tiny_model("llama")
    options = ("--against", source, "--window", 24, "--windows", 2)

    def refusal(*arguments: object) -> str:
        status, _, err = ran(capsys, source, *options, *arguments)
        assert status == 1
        return err.removeprefix("error: ").removesuffix("\n")

    missing = tmp_path / "missing"
    assert refusal("--text", missing) == (
        f"{missing}: cannot be read (No such file or directory); name a text"
    )
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert refusal("--text", tmp_path / "latin") == (
        f"{tmp_path / 'latin'}: is not text in UTF-8 (byte 3); save it as UTF-8"
    )
    assert refusal("--text", text, "--windows", 9) == (
        f"{text}: gives 3 windows of 24 tokens and 9 are wanted; "
        "give a longer text, or fewer --windows"
    )


@pytest.mark.slow
def test_another_models_vocabulary_is_refused(tiny_model, text, tmp_path, capsys):
    source, other = tiny_model("llama"), tmp_path / "other"
    shutil.copytree(tiny_model("llama", vocab_size=192), other)
    options = ("--against", source, "--text", text, "--window", 24, "--windows", 1)
    status, _, err = ran(capsys, other, *options)
    assert (status, err) == (
        1,
        f"error: {other}: gives logits for 192 tokens and {source} for 128; "
        "name the float model that it was made from\n",
    )


def test_a_point_of_the_plot_is_the_mean_of_what_came_before_it():
    found = smoothed(torch.arange(AROUND + 2.0))
    want = [i / 2 for i in range(AROUND)] + [(AROUND - 1) / 2 + 1, (AROUND - 1) / 2 + 2]
    assert found.tolist() == want


@pytest.mark.slow
def test_a_plot_knows_what_each_cache_costs(text, tmp_path, capsys, monkeypatch):
    source = QUANTIZED.parent / "orig"
    options = ("--against", source, "--text", text, "--windows", 1, "--window", 24)
    drawn = []
    monkeypatch.setattr(evaluating, "draw", lambda *given: drawn.append(given))
    assert ran(capsys, QUANTIZED, source, *options, "--plot", tmp_path / "kl.png")[0] == 0
    [(_, title, [ours, plain])] = drawn
    assert (title, ours.name) == (f"against {source}, 1 windows", str(QUANTIZED))
    layers = open_checkpoint(QUANTIZED).config["num_hidden_layers"]
    assert [side for side, _ in ours.by_cache] == ["K", "V"] * layers + ["K and V"]
    assert all(kl > 0 for _, kl in ours.by_cache)
    assert plain.by_cache == []  # it has a float cache
    assert ran(capsys, QUANTIZED, *options, "--plot", tmp_path / "a", "--float-cache")[0] == 0
    assert drawn[1][2][0].by_cache == []


@pytest.mark.slow
def test_a_plot(text, tmp_path, capsys):
    source = QUANTIZED.parent / "orig"
    options = ("--against", source, "--text", text, "--windows", 1, "--window", 24)
    picture = tmp_path / "kl.png"
    assert ran(capsys, QUANTIZED, *options, "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    status, _, err = ran(capsys, QUANTIZED, *options, "--plot", tmp_path / "kl.what")
    assert status == 1
    assert err.startswith(f"error: {tmp_path}/kl.what: cannot be written (")
    assert err.endswith("); name a .png file\n")
