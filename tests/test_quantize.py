"""kvc8-quantize: what it writes, measured against the float model, and what it refuses."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import others
from support.notes import of_float32
from support.steps import step, values
from transformers import AutoModelForCausalLM

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.checkpoint.w8a8 import Range, input_params, kv_scale, quantize_linear
from kvc8.ir.program import argument
from kvc8.ir.run import run
from kvc8.passes.insert_linear_quant import insert_linear_quant
from kvc8.tools import command, quantize
from kvc8.tools.driver.tokenizer import read_tokenizer

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
LINEAR = torch.ops.aten.linear.default
TEXTS = ("The sea is a very large thing.", "12 + 30 = 42", "def f(x): return x", "Why not? ~!{}")
WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8.safetensors", "quant_model_description.json"
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def quantize_(directory: Path, out: Path, texts: Path, *options: str) -> int:
    arguments = [str(directory), "-o", str(out), "--calib-file", str(texts), *options]
    if "--recipe" not in options:
        arguments += ["--recipe", "minmax"]  # the numbers of which are said here in plain formulas
    return command.entry(quantize.parser(), quantize.work, arguments)


def in_dtype(directory: Path, new: Path, dtype: str, **changed: torch.Tensor) -> Path:
    """A copy of a model that stores its tensors in another dtype, and some of them changed."""
    shutil.copytree(directory, new)
    found = {**load_file(new / "model.safetensors"), **changed}
    kind = getattr(torch, dtype)
    save_file({n: t.to(kind) for n, t in found.items()}, new / "model.safetensors")
    edit_json(new / "config.json", dtype=dtype)
    return new


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tokens_of(directory: Path) -> list[list[int]]:
    return [read_tokenizer(directory).encode(text) for text in TEXTS]


def deq_scale(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    found = parts["deq_scale"]
    return found if found.dtype is torch.float32 else found.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_result_opens_and_accounts_for_every_tensor(kind, tied, tiny_model, texts, tmp_path):
    source, out = tiny_model(kind, tied=tied), tmp_path / "out"
    assert quantize_(source, out, texts) == 0
    found, before = open_checkpoint(out), open_checkpoint(source)
    assert (found.warnings, found.layout, found.kv_calibrated) == ((), "ascendV1", "post-rope")
    assert set(found.kv) == set(range(4))
    assert len(found.w8a8) == 4 * 6  # all but down_proj and lm_head
    parts = ("weight_scale", "weight_offset", "input_scale", "input_offset")
    parts += ("quant_bias", "deq_scale")
    new = {f"{module}.{part}" for module in found.w8a8 for part in parts}
    new |= {
        f"model.layers.{i}.self_attn.{side}_proj.kv_cache_{part}"
        for i in range(4)
        for side in "kv"
        for part in ("scale", "offset")
    }
    assert set(found.tensors) == {*before.tensors, *new}
    assert ("lm_head.weight" in found.tensors) is not tied
    for name in set(before.tensors) - {f"{module}.weight" for module in found.w8a8}:
        assert found.tensors[name].dtype is before.tensors[name].dtype
        assert torch.equal(found.read(name), before.read(name))
    config = json.loads((out / "config.json").read_text())
    assert config["quantize"] == "w8a8"
    assert "quantization_config" not in config  # with it vllm-ascend does not read the description
    assert config["tie_word_embeddings"] is tied
    count = sum(map(len, tokens_of(source)))
    recipe = {"kv_calibrated": "post-rope", "recipe": "min-max, K after RoPE"}
    assert found.kvc8 == {**recipe, "texts": 4, "tokens": count}
    assert read_tokenizer(out).encode("as before") == read_tokenizer(source).encode("as before")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_float_model(kind, dtype, tiny_model, texts, tmp_path):
    """Hooks and cache of transformers give the ranges; a window would cut its cache short."""
    source, out = in_dtype(tiny_model(kind), tmp_path / "m", dtype), tmp_path / "out"
    assert quantize_(source, out, texts) == 0
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ranges: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: ranges[name].append(args[0])
            )
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    for tokens in tokens_of(source):
        with torch.no_grad():
            cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            for side, x in (("k", layer.keys), ("v", layer.values)):
                rows[f"model.layers.{i}.self_attn.{side}_proj"].append(
                    x[0].transpose(0, 1).flatten(1)
                )
    stored, kind_ = load_file(out / WEIGHTS), getattr(torch, dtype)
    eps = torch.finfo(kind_).eps + 1e-5  # rounded up by less than one place; sums in another order
    for name, found in rows.items():
        want = torch.cat(found).abs().amax(0) / 127
        scale = stored[f"{name}.kv_cache_scale"]
        assert scale.dtype is kind_
        assert (scale.float() >= want * (1 - 1e-5)).all()
        assert (scale.float() <= want * (1 + eps)).all()
        assert not stored[f"{name}.kv_cache_offset"].any()
    weights = dict(model.named_parameters())
    for name in open_checkpoint(out).w8a8:
        x = torch.cat([x.flatten() for x in ranges[name]])
        parts = {
            n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.")
        }
        bias = weights.get(f"{name}.bias")
        check_linear(parts, weights[f"{name}.weight"].detach(), bias, x.min(), x.max(), eps)
        assert parts["deq_scale"].dtype is (torch.float32 if dtype == "bfloat16" else torch.int64)


def check_linear(parts, weight, bias, low, high, eps):
    """A W8A8 linear's tensors against its float weight and the range of its input."""
    in_scale, offset = parts["input_scale"].float(), parts["input_offset"].float()
    want = (high - low) / 255
    assert want * (1 - 1e-5) <= in_scale <= want * (1 + eps)
    assert (offset - (-low / in_scale - 128)).abs() <= 0.5 + 1e-3
    scale, w8 = parts["weight_scale"].float(), parts["weight"].float()
    assert (w8.abs().amax(1) >= 126).all()  # no code is wasted
    assert w8.abs().max() <= 127
    assert ((w8 * scale - weight).abs() <= scale / 2 * (1 + 1e-5)).all()
    deq = deq_scale(parts)
    assert torch.equal(deq, in_scale * scale[:, 0])
    meant = (parts["quant_bias"].double() + w8.double().sum(1) * offset.double()) * deq
    bias = torch.zeros(len(deq)) if bias is None else bias.detach()
    assert ((meant - bias).abs() <= deq / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_k_or_v_of_the_texts_clips(kind, dtype, tiny_model, texts, tmp_path):
    source, out = in_dtype(tiny_model(kind), tmp_path / "m", dtype), tmp_path / "out"
    assert quantize_(source, out, texts, "--max-tokens", "17") == 0
    program, stored = capture(open_checkpoint(source), torch.float32), load_file(out / WEIGHTS)
    writes = {argument(node, 1): node for node in program.calls(ops.cache_write)}
    codes: dict[str, torch.Tensor] = {}

    def observe(node, value):
        if node in writes:
            side = writes[node].name[0]
            name = f"{writes[node].meta['origin']}.{side}_proj.kv_cache_scale"
            reach = (value.flatten(1).abs() / stored[name].float()).amax(0)
            codes[name] = torch.maximum(codes.get(name, reach), reach)

    made = values(program, source)
    for tokens in tokens_of(source):
        tokens = tokens[:17]
        run(program, {**made, **step(tokens, [0], [len(tokens)], [[0, 1, 2, 3, 4]])}, observe)
    assert len(codes) == 8
    for reach in codes.values():
        assert reach.max() <= 127 * (1 + 1e-5)
        assert reach.min() >= 127 * (1 - 2**-10 - 1e-5)  # and no channel has room to spare


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_each_linear_stays_within_its_bound(kind, tiny_model, texts, tmp_path):
    """|y - y'| <= s/2·Σ|w'| + s_w/2·Σ|x| + deq/2: rounded inputs, weights and bias, added up."""
    source, out = tiny_model(kind), tmp_path / "out"
    assert quantize_(source, out, texts, "--down-proj") == 0
    program, checkpoint = capture(open_checkpoint(source)), open_checkpoint(out)
    quantized = capture(checkpoint, torch.float32)
    insert_linear_quant(quantized)
    assert len(quantized.calls(ops.quant_linear)) == 4 * 7
    stored, held = load_file(out / WEIGHTS), {}
    linears = {node: node.meta["origin"] for node in program.calls(LINEAR)}

    def observe(node, value):
        held[node] = value
        if linears.get(node) in checkpoint.w8a8:
            check(held[argument(node, 0)][0], value[0], linears[node])

    def check(x, y, name):
        parts = {
            n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.")
        }
        s, deq, w_scale = parts["input_scale"], deq_scale(parts), parts["weight_scale"][:, 0]
        x8 = ops.quantize(x, s, parts["input_offset"])
        new = ops.quant_linear(x8, parts["weight"], deq, parts["quant_bias"], torch.float32)
        w = (parts["weight"].float() * parts["weight_scale"]).abs().sum(1)
        bound = s / 2 * w + w_scale / 2 * x.abs().sum(1, keepdim=True) + deq / 2
        assert ((new - y).abs() <= bound * (1 + 1e-4)).all()

    made = values(program, source)
    for tokens in tokens_of(source):
        run(program, {**made, **step(tokens, [0], [len(tokens)], [list(range(8))])}, observe)


def test_the_same_run_twice_writes_the_same_bytes(tiny_model, texts, tmp_path):
    for name in ("a", "b"):
        assert quantize_(tiny_model("qwen2"), tmp_path / name, texts) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", DESCRIPTION, WEIGHTS, "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_dead_channel_has_a_scale_that_float16_can_invert(tiny_model, texts, tmp_path):
    name = "model.layers.1.self_attn.v_proj"
    weight = load_file(tiny_model("llama") / "model.safetensors")[f"{name}.weight"]
    weight[3] = 0
    changed = {f"{name}.weight": weight}
    source = in_dtype(tiny_model("llama"), tmp_path / "m", "float16", **changed)
    assert quantize_(source, tmp_path / "out", texts) == 0
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert stored[f"{name}.kv_cache_scale"][3] == torch.finfo(torch.float16).smallest_normal
    assert (1 / stored[f"{name}.kv_cache_scale"]).isfinite().all()
    assert not stored[f"{name}.weight"][3].any()
    assert torch.equal(
        kv_scale(torch.zeros(2), torch.bfloat16), torch.full((2,), 2.0**-23).bfloat16()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_of_zeros_keeps_its_bias(dtype):
    """Its scale grows until the bias fits into an int32."""
    weight, bias = torch.zeros(2, 8, dtype=dtype), torch.tensor([50.0, -0.25], dtype=dtype)
    parts = quantize_linear(weight, bias, Range(-0.01, 0.02), dtype)
    got = parts["quant_bias"].double() * deq_scale(parts)
    assert (got - bias.double()).abs().max() <= deq_scale(parts).max()
    assert float(input_params(Range(0, 0), torch.float16)[0]) == 2.0**-14


def test_both_copies_of_a_tied_head_become_one(tiny_model, texts, tmp_path, capsys):
    source = tmp_path / "m"
    table = load_file(tiny_model("llama", tied=True) / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    in_dtype(tiny_model("llama", tied=True), source, "float32", **{"lm_head.weight": table})
    capsys.readouterr()
    assert quantize_(source, tmp_path / "out", texts) == 0
    found = open_checkpoint(tmp_path / "out")
    assert found.warnings == ()
    assert "lm_head.weight" not in found.tensors
    notes = [f"note: {source}: lm_head.weight is not copied\n", f"{of_float32(source)}\n"]
    assert capsys.readouterr().err == "".join(notes)


def test_what_reads_one_value_stays_float_together(tiny_model, texts, tmp_path):
    source = tiny_model("llama")
    options = ("--disable", "model.layers.0.*.k_proj", "lm_head", "--no-use-kvcache-quant")
    assert quantize_(source, tmp_path / "out", texts, "--down-proj", *options) == 0
    found = open_checkpoint(tmp_path / "out")
    assert (found.warnings, found.kv, found.kv_calibrated) == ((), {}, None)
    first = [name.split(".")[-1] for name in found.w8a8 if ".0." in name]
    assert sorted(first) == ["down_proj", "gate_proj", "o_proj", "up_proj"]
    assert len(found.w8a8) == 4 * 7 - 3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_scales_for_the_cache_alone(tiny_model, texts, tmp_path):
    assert quantize_(tiny_model("llama"), tmp_path / "out", texts, "--disable", "*") == 0
    found = open_checkpoint(tmp_path / "out")
    assert (len(found.kv), found.w8a8) == (4, {})
    [warning] = found.warnings
    assert ": the vendor does not support C8 without W8A8; " in str(warning)
    assert json.loads((tmp_path / "out" / DESCRIPTION).read_text())["model_quant_type"] == "FLOAT"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--w-bit 4", "--w-bit: 4 is not there yet, weights are 8 bits wide; leave the option out"),
        ("--a_bit 16", "--a-bit: 16 is not there yet, activations are 8 bits wide; leave the "
         "option out"),
        ("--anti-method m1", "--anti-method: m1 is not there yet; use m3 or none"),
        ("--recipe minmax --act_method 3", "--act-method: is not for --recipe minmax; leave it "
         "out or use --recipe msmodelslim"),
        ("--recipe minmax --kv-asym", "--kv-asym: is not for --recipe minmax; leave it out or use "
         "--recipe msmodelslim"),
        ("--recipe minmax --rollback 5", "--rollback: is not for --recipe minmax; leave it out or "
         "use --recipe kvc8"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(options, said, tiny_model, texts, tmp_path, capsys):
    assert refusal(capsys, tiny_model("llama"), tmp_path, texts, *options.split()) == said


def refusal(capsys, directory: Path, folder: Path, texts: Path, *options: str) -> str:
    """The one sentence of a refused run, which leaves nothing behind."""
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert quantize_(directory, folder / "out", texts, *options) == 1
    assert sorted(folder.iterdir()) == before
    [said] = capsys.readouterr().err.splitlines()
    return said.removeprefix("error: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": holds no text; write one text a line, as JSON"),
        ('{"text": "a"}\n\n{"text"\n', ": line 3: is not JSON (Expecting ':' delimiter: line 1 "
         "column 8 (char 7)); write one object a line"),
        ("[1]\n", ': line 1: is no object; write {"text": "..."}'),
        ('{"title": "a"}', ": line 1: has none of inputs_pretokenized, text, prompt, messages or "
         "input_ids; name its text so"),
        ('{"text": "a"}\n{"prompt": 7}', ": line 2: prompt is 7; give it a text"),
        ('{"inputs_pretokenized": ""}', ": line 1: inputs_pretokenized is empty; give it a text"),
        ('{"messages": [{"role": "user"}]}', ": line 1: messages is no list of role and content; "
         "write a chat so"),
    ],
)  # fmt: skip
def test_a_wrong_calibration_file(content, said, tiny_model, tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text(content)
    assert refusal(capsys, tiny_model("llama"), tmp_path, path) == f"{path}{said}"


def test_texts_that_cannot_be_read(tiny_model, tmp_path, capsys):
    model, path = tiny_model("llama"), tmp_path / "texts"
    assert refusal(capsys, model, tmp_path, path) == (
        f"{path}: cannot be read (No such file or directory); name a file of texts"
    )
    path.write_bytes(b"caf\xe9")
    assert refusal(capsys, model, tmp_path, path) == (
        f"{path}: is not text in UTF-8 (byte 3); save it as UTF-8"
    )


def test_plain_text_is_cut_at_blank_lines(tiny_model, tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert quantize_(tiny_model("llama"), tmp_path / "out", path) == 0
    assert open_checkpoint(tmp_path / "out").kvc8["texts"] == 2
    assert open_checkpoint(tmp_path / "out").kvc8["tokens"] == len("one\ntwo" + "three")


def test_models_that_cannot_be_quantized(tiny_model, texts, tmp_path, capsys):
    made, bad, small = tmp_path / "made", tmp_path / "bad", tmp_path / "small"
    assert quantize_(tiny_model("llama"), made, texts) == 0
    assert refusal(capsys, made, tmp_path, texts) == (
        f"{made}: is quantized already (ascendV1); name the float model it came from"
    )
    nan = {"model.layers.2.mlp.up_proj.weight": torch.full((128, 64), float("nan"))}
    in_dtype(tiny_model("llama"), bad, "float32", **nan)
    assert refusal(capsys, bad, tmp_path, texts) == (
        f"{bad}: transformers' own LlamaForCausalLM gives logits that are not finite, first in "
        "model.layers.2.mlp.up_proj; check the model's weights"
    )
    shutil.copytree(tiny_model("llama", vocab_size=70), small)
    assert refusal(capsys, small, tmp_path, texts) == (
        f"{texts}: line 1: gives token {max(tokens_of(small)[0])} and the model has 70; "
        "copy the tokenizer that belongs to it"
    )
    latent = tiny_model("minicpm3", **others(16)["minicpm3"], num_hidden_layers=2)
    assert refusal(capsys, latent, tmp_path, texts) == (
        f"{latent}/config.json: asks for multi-head latent attention, whose cache of latents kvc8 "
        "keeps in float; compile it as it is"
    )
    assert refusal(capsys, tiny_model("llama"), tmp_path, texts, "--disable", "q") == (
        "--disable q: names no linear of this model; "
        "write one as model.layers.0.mlp.up_proj, or with * for any characters"
    )
    assert refusal(capsys, tiny_model("llama"), tmp_path, texts, "--model_path", "x") == (
        "kvc8-quantize: two models are named; give one directory"
    )
    nothing = ("--disable", "*", "--no-use-kvcache-quant")
    assert refusal(capsys, tiny_model("llama"), tmp_path, texts, *nothing) == (
        "--disable: leaves nothing to quantize; name fewer linears"
    )
    (tmp_path / "out").mkdir()
    assert refusal(capsys, tiny_model("llama"), tmp_path, texts) == (
        f"{tmp_path / 'out'}: exists already; choose another directory or remove it"
    )


def test_the_line_of_progress_has_layers_and_tokens_a_second():
    assert quantize.speed(11.4, 30, 8_000, 2.0) == "11/30 layers, 4,000 tokens/s a layer"
