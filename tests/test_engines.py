"""Directories in the form that engines want, and programs computed as engines compute them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from kvc8.backends.runtime import model as runtime
from kvc8.backends.runtime.inputs import Rows
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.passes import pipeline
from kvc8.tools import command, convert, quantize
from kvc8.tools.engines import arithmetic
from kvc8.tools.engines.arithmetic import as_engine
from kvc8.tools.quantizer.engine_form import config_for

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weight_w8a8.safetensors"
HEADS, DIM = 2, 32  # of the golden models


def convert_(source: Path, out: Path, engine: str = "vllm-ascend") -> int:
    arguments = [str(source), "--for", engine, "-o", str(out)]
    return command.entry(convert.parser(), convert.work, arguments)


def said(capsys, source: Path, folder: Path, engine: str = "vllm-ascend") -> str:
    assert convert_(source, folder / "refused", engine) == 1
    assert not (folder / "refused").exists()
    return capsys.readouterr().err.replace(str(source), "DIR").strip().splitlines()[-1]


def edited(source: Path, new: Path, **changed: torch.Tensor) -> Path:
    """A copy with other tensors."""
    shutil.copytree(source, new)
    for path in new.iterdir():
        path.chmod(0o600)
    save_file({**load_file(new / WEIGHTS), **changed}, new / WEIGHTS)
    return new


def edit_json(path: Path, **changes: object) -> None:
    path.chmod(0o600)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plain_bound(scale: torch.Tensor, zero: torch.Tensor) -> np.ndarray:
    """What a scale measured before RoPE bounds after it: the formula, in float64."""
    z = zero.double().numpy()
    far = np.maximum(128 + z, 127 - z) if z.any() else 127.0
    reach = scale.double().numpy() * far
    first, second = np.split((reach / 127).reshape(HEADS, DIM), 2, axis=1)
    both = np.sqrt(first**2 + second**2)
    return np.concatenate([both, both], axis=1).flatten()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_fp16_m3", "qwen2_fp16_none_asym"])
def test_a_vendors_directory_is_mended_and_nothing_else_of_it_changes(name, tmp_path, capsys):
    source = GOLDEN / name / "quant"
    assert convert_(source, tmp_path / "out") == 0
    found, before = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    assert (found.warnings, found.layout, found.kv_calibrated) == ((), "ascendV1", "post-rope")
    old, new = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(old) == set(new)
    step = 1 + 2.0**-10  # one place of float16, by which a scale may be rounded up
    for layer in before.kv:
        k, v = (f"model.layers.{layer}.self_attn.{side}_proj.kv_cache" for side in "kv")
        want = plain_bound(old[f"{k}_scale"], old[f"{k}_offset"])
        scale = new[f"{k}_scale"].double().numpy()
        assert (scale >= want * (1 - 1e-6)).all()  # the bound is stored in float32 once
        assert (scale <= want * step).all()
        zero = old[f"{v}_offset"].double()
        reach = old[f"{v}_scale"].double() * torch.maximum(128 + zero, 127 - zero) / 127
        kept = reach if zero.any() else old[f"{v}_scale"].double()
        assert (new[f"{v}_scale"] >= kept * (1 - 1e-6)).all()
        assert (new[f"{v}_scale"] <= kept * step).all()
        assert not any(new[f"{side}_offset"].any() for side in (k, v))
    for tensor in set(old):
        if "kv_cache" not in tensor:
            # A histogram's float32 scale is rounded as the engine would when it copies it.
            assert torch.equal(new[tensor], old[tensor].to(new[tensor].dtype))
    assert f"K scales of {len(before.kv)} layers widened" in capsys.readouterr().out


def test_every_tensor_has_the_dtype_of_its_parameter(tmp_path):
    assert convert_(GOLDEN / "llama_fp16_m3_mindie_safe_tensor" / "quant", tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert not [name for name in tensors if ".module." in name]  # no engine has such a parameter
    others = {"weight": None, "quant_bias": torch.int32, "input_offset": torch.int8}
    others["deq_scale"] = torch.int64
    for name, tensor in tensors.items():
        part = name.rpartition(".")[2]
        assert tensor.dtype is others.get(part, torch.float16) or part == "weight", name
    description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert "fa_quant_type" not in description  # its null switches another cache format on
    assert description["kv_cache_type"] == "C8"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_for_mindie_config_json_says_what_the_page_asks_for(tmp_path):
    assert convert_(GOLDEN / "v1_qwen2_fp16_w8a8c8" / "quant", tmp_path / "out", "mindie") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["kv_quant_type"] == "C8"
    assert (tmp_path / "out" / "quant_model_description_w8a8.json").exists()
    assert not (tmp_path / "out" / DESCRIPTION).exists()
    found = open_checkpoint(tmp_path / "out")
    assert found.kv_calibrated == "post-rope"  # as msModelSlim's newer command measured it
    before = open_checkpoint(GOLDEN / "v1_qwen2_fp16_w8a8c8" / "quant")
    for pair in before.kv.values():
        for cache in pair:
            assert torch.equal(found.read(cache.scale), before.read(cache.scale))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    ],
)
def test_what_transformers_4_looks_for_changes_nothing_for_5(rope, tmp_path):
    AutoConfig.for_model("llama", rope_parameters=rope, dtype="float16").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    given = config_for("mindie", config, ["W8A8"])
    assert (given["rope_theta"], given["torch_dtype"]) == (rope["rope_theta"], "float16")
    assert ("rope_scaling" in given) is (rope["rope_type"] != "default")
    before = AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == before.rope_parameters


@pytest.mark.slow
def test_files_in_which_nothing_changes_are_linked(tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert convert_(GOLDEN / "llama_fp16_m3" / "quant", whole) == 0
    assert convert_(whole, tmp_path / "again") == 0
    assert (tmp_path / "again" / WEIGHTS).samefile(whole / WEIGHTS)
    shutil.copytree(whole, split)
    (split / WEIGHTS).unlink()
    tensors, names = load_file(whole / WEIGHTS), [f"{WEIGHTS[:-12]}-{i}.safetensors" for i in "12"]
    parts = [{n: t for n, t in tensors.items() if ("k_proj.kv" in n) is k} for k in (True, False)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, split / name)
    index = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    (split / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    edit_json(split / DESCRIPTION, kvc8={"kv_calibrated": "pre-rope"})
    assert convert_(split, tmp_path / "out") == 0
    assert (tmp_path / "out" / names[1]).samefile(split / names[1])
    assert not (tmp_path / "out" / names[0]).samefile(split / names[0])
    assert len(open_checkpoint(tmp_path / "out").tensors) == len(tensors)


def test_what_an_engine_would_misread_is_refused(tmp_path, capsys):
    source = tmp_path / "source"
    assert convert_(GOLDEN / "llama_fp16_m3" / "quant", source) == 0
    name = "model.layers.1.self_attn.k_proj.input_scale"
    other = edited(source, tmp_path / "a", **{name: torch.tensor([0.5], dtype=torch.float16)})
    assert said(capsys, other, tmp_path) == (
        "error: model.layers.1.self_attn: q_proj, k_proj, v_proj have other input scales, and "
        "vllm-ascend keeps one; quantize them again with kvc8-quantize"
    )
    name = "model.layers.1.self_attn.k_proj.input_offset"
    wide = edited(source, tmp_path / "b", **{name: torch.tensor([0.5], dtype=torch.float16)})
    for side in "qv":
        edited_name = name.replace("k_proj", f"{side}_proj")
        wide = edited(wide, tmp_path / f"b{side}", **{edited_name: torch.tensor([0.5]).half()})
    assert said(capsys, wide, tmp_path) == (
        f"error: DIR/{WEIGHTS}: model.layers.1.self_attn.k_proj.input_offset is no whole number "
        "from -128 to 127, as an engine's parameter is; quantize the model again"
    )
    edit_json(source / "config.json", torch_dtype="float32")
    assert said(capsys, source, tmp_path, "mindie") == (
        "error: DIR/config.json: says float32, in which MindIE does not compute; "
        "convert the model to float16 or bfloat16"
    )
    assert said(capsys, GOLDEN / "llama_fp16_m3" / "orig", tmp_path) == (
        "error: DIR: is float, and no directory of msModelSlim's layouts; "
        "quantize it with kvc8-quantize"
    )


def test_linears_of_two_kinds_that_an_engine_packs_are_refused(tmp_path, capsys):
    source, layer = tmp_path / "source", "model.layers.0.mlp"
    assert convert_(GOLDEN / "llama_fp16_m3" / "quant", source) == 0
    tensors, labels = load_file(source / WEIGHTS), json.loads((source / DESCRIPTION).read_text())
    for name in [n for n in tensors if n.startswith(f"{layer}.up_proj.")]:
        del tensors[name], labels[name]
    width = tensors[f"{layer}.gate_proj.weight"].shape
    tensors[f"{layer}.up_proj.weight"] = torch.zeros(width, dtype=torch.float16)
    save_file(tensors, source / WEIGHTS)
    (source / DESCRIPTION).write_text(json.dumps({**labels, f"{layer}.up_proj.weight": "FLOAT"}))
    assert said(capsys, source, tmp_path) == (
        "error: model.layers.0.mlp: is gate_proj W8A8, up_proj FLOAT, and vllm-ascend packs them "
        "into one linear; quantize all of them or none"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--for", "mindie", "--kv-asym"],
            "--kv-asym: MindIE does not take zero points off again; "
            "leave it out, or leave --for out for kvc8 alone",
        ),
        (
            ["--for", "vllm-ascend", "--dtype", "float32"],
            "--dtype float32: vllm-ascend copies its tensors into parameters of float16; "
            "leave it out",
        ),
        (
            ["--for", "vllm-ascend", "--save-type", "safe_tensor"],
            "--save-type safe_tensor: vllm-ascend looks for quant_model_description.json only; "
            "leave it out",
        ),
    ],
)
def test_options_that_an_engine_would_misread(options, sentence, tmp_path, capsys):
    source = GOLDEN / "llama_fp16_m3" / "orig"
    texts = tmp_path / "texts.txt"
    texts.write_text("a text")
    arguments = [str(source), "-o", str(tmp_path / "out"), "--calib-file", str(texts), *options]
    assert command.entry(quantize.parser(), quantize.work, arguments) == 1
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_float32_model_is_in_no_engine(tiny_model, tmp_path, capsys):
    source = tiny_model("llama")
    capsys.readouterr()  # what transformers said when it saved the model
    texts = tmp_path / "texts.txt"
    texts.write_text("The sea is a very large thing.")
    arguments = [str(source), "-o", str(tmp_path / "out"), "--calib-file", str(texts), "--for"]
    assert command.entry(quantize.parser(), quantize.work, [*arguments, "vllm-ascend"]) == 1
    assert capsys.readouterr().err == (
        f"error: {source}/config.json: says float32, in which vllm-ascend does not compute; "
        "convert the model to float16 or bfloat16\n"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_engines_write_their_codes_by_their_own_rounding(dtype):
    """Every step as the engine's code has it, on numbers near the middle between two codes."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2, 8, generator=random).to(dtype)
    scale = (torch.rand(2, 8, generator=random) / 64 + 0.001).to(dtype).float()
    zero = torch.randint(-5, 5, (2, 8), generator=random).float()
    s, z = scale.to(dtype), zero.to(dtype)
    want = torch.clamp(torch.round(x * (1.0 / s) + z), -128, 127).to(torch.int8)
    assert torch.equal(arithmetic.vllm_write(x, scale, zero), want)
    exact = torch.clamp(torch.round(x.double() / s.double()), -128, 127).to(torch.int8)
    got = arithmetic.mindie_write(x, scale, zero)
    # A quotient below 128 rounded to float16 moves by at most 1/32, so only to the code beside it.
    assert (got.int() - exact.int()).abs().max() <= 1
    fraction = (x.double() / s.double() % 1 - 0.5).abs()
    assert torch.equal(got[fraction > 1 / 16], exact[fraction > 1 / 16])


@pytest.fixture
def power_of_two(tiny_c8, tmp_path) -> Path:
    """Float linears and scales whose reciprocals are exact, in float32."""
    source, new = tiny_c8("llama", "float"), tmp_path / "c8"
    tensors = load_file(source / WEIGHTS)
    powers = {n: torch.exp2(t.log2().ceil()) for n, t in tensors.items() if "cache_scale" in n}
    return edited(source, new, **powers)


def step(programs, checkpoint, phase: str, tokens: list[int]) -> torch.Tensor:
    def made(expression: object) -> torch.Tensor:
        return make(expression, checkpoint.read)  # type: ignore[arg-type]

    loaded = runtime.load(programs, made, blocks=1, block_size=128)
    return loaded.step(phase, [Rows(tokens, 0, [0])], every=True)


@pytest.mark.slow
def test_what_an_engine_computes_is_the_program_but_for_its_rounding(power_of_two):
    """In float32, with exact reciprocals, nothing is left of how vllm-ascend rounds."""
    checkpoint, tokens = open_checkpoint(power_of_two), list(range(4, 60))
    program = capture(checkpoint, torch.float32)
    floats = program.copy()
    pipeline.run(program, pipeline.AS_IS)
    for engine in ("vllm-ascend", "mindie"):
        programs = as_engine(program, engine)
        want = step({"decode": floats}, checkpoint, "decode", tokens)
        assert torch.equal(step(programs, checkpoint, "prefill", tokens), want)
    want = step({"decode": program}, checkpoint, "decode", tokens)
    programs = as_engine(program, "vllm-ascend")
    for phase in ("chunk", "decode"):
        assert torch.equal(step(programs, checkpoint, phase, tokens), want)


@pytest.mark.slow
def test_vllm_ascend_does_not_look_at_windows(tiny_c8):
    checkpoint, tokens = open_checkpoint(tiny_c8("mistral", "float")), list(range(4, 60))
    program = capture(checkpoint, torch.float32)
    pipeline.run(program, pipeline.AS_IS)
    with_window = step(as_engine(program, "mindie"), checkpoint, "prefill", tokens)
    without = step(as_engine(program, "vllm-ascend"), checkpoint, "prefill", tokens)
    differs = (with_window != without).any(1).nonzero()[:, 0]
    window = checkpoint.config["sliding_window"]
    assert int(differs[0]) >= window  # tokens within the first window see the same
    assert len(differs)
