"""kvc8-quantize --recipe msmodelslim: what msModelSlim writes, the whole way.

To the bit on CPUs like the one that the golden directories come from. test_vendor_numbers.py holds
on every CPU what does not hang on how it multiplies in float16.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools import command, quantize
from kvc8.tools.driver.tokenizer import read_tokenizer

pytestmark = pytest.mark.slow  # float16 on a CPU
GOLDEN = Path(__file__).parent / "golden" / "checkpoints"


def quantize_(*arguments: str) -> int:
    return command.entry(quantize.parser(), quantize.work, arguments)


def calibration(golden: Path, path: Path) -> Path:
    """The texts of a golden run; its tokens where transformers 5 makes others of them.

    transformers 5 takes Qwen2's own tokenizer wherever config.json says qwen2, and leaves the
    pre-tokenizer of tokenizer.json aside.
    """
    said = json.loads((golden / "calib.json").read_text())
    tokens = [ids[0] if isinstance(ids[0], list) else ids for ids in said["input_ids"]]
    lines = [{"inputs_pretokenized": text} for text in said["texts"]]
    if golden.name.startswith("qwen2"):
        lines = [{"input_ids": ids} for ids in tokens]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def multiplies_as_recorded() -> bool:
    """Whether float16 products are rounded here as in the golden directories.

    Theirs were made by torch's own kernels in vectors of AVX-512. oneDNN's, which are taken where a
    CPU has float16 products of its own, sum in another order, and so do shorter vectors.
    """
    own = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not own


# A number in float16 is rounded the other way, by 2**-10 of it, where a sum in another order ends
# beyond a middle. On its way through a layer a token passes ten such sums: two norms, qkv, logits,
# softmax, the mean of V, o, gate|up, silu and down. K and V come after two more.
STEP, A_LAYER, MORE = 2.0**-10, 10, 2


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """The cache's scales, of first order in the steps.

    Ranges of later inputs are left out: one code of an input more or less decides how far the
    search of a histogram goes.
    """
    for name in (n for n in want if n.endswith(".kv_cache_scale")):
        off = STEP * (A_LAYER * int(name.split(".")[2]) + MORE)
        scale, offset = want[name].double(), f"{name.removesuffix('scale')}offset"
        assert (got[name] - scale).abs().max() <= off * scale.max(), name
        moved = (got[offset] - want[offset]).abs().double()
        assert (moved * scale).max() <= (0.5 + 255 * off) * scale.max(), offset


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llama_fp16_m3", "llama_fp16_m3"),
        ("llama_fp16_m3_mindie_safe_tensor", "llama_fp16_m3"),
        ("qwen2_fp16_none_asym", "qwen2_fp16_none_asym"),
    ],
)
def test_every_tensor_and_label_is_the_vendors(name, source, tmp_path):
    golden, out = GOLDEN / name, tmp_path / "out"
    run = json.loads((golden / "run.json").read_text())["opts"]
    spelled = f"--model_path {GOLDEN / source / 'orig'} --save_directory {out} "
    spelled += f"--calib_file {calibration(golden, tmp_path / 'calib.jsonl')} "
    spelled += f"--w_bit 8 --a_bit 8 --act_method {run['act_method']} --anti_method {run['anti']} "
    spelled += f"--disable_level {run['level']} --device_type cpu --use_kvcache_quant True "
    spelled += f"--save_type {run['save']}" + ("" if run["kv_sym"] else " --kv-asym")
    assert quantize_(*spelled.split()) == 0
    want = load_file(golden / "quant" / "quant_model_weight_w8a8.safetensors")
    got = load_file(out / "quant_model_weight_w8a8.safetensors")
    types = [{n: (t.dtype, t.shape) for n, t in each.items()} for each in (got, want)]
    assert types[0] == types[1]
    if multiplies_as_recorded():
        assert [n for n, t in want.items() if not torch.equal(t, got[n])] == []
    assert_near(got, want)
    [description] = [path.name for path in (golden / "quant").glob("quant_model_description*")]
    for file in (description, "config.json"):
        new, old = (json.loads((d / file).read_text()) for d in (out, golden / "quant"))
        assert list(new.items()) == list(old.items())


TEXTS = ("The sea is a very large thing.", "12 + 30 = 42", "def f(x): return x")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def made(model: Path, out: Path, texts: Path, *options: str) -> dict[str, torch.Tensor]:
    """What is written with the recipe's options beside the common ones."""
    common = ("--recipe", "msmodelslim", "--calib-file", str(texts), "-o", str(out))
    assert quantize_(str(model), *common, *options) == 0
    return load_file(out / "quant_model_weight_w8a8.safetensors")


def float_run(model: Path) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What each linear of the float model takes and gives, by text."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, y, name=name: seen.setdefault(name, []).append((args[0], y))
            )
    with torch.no_grad():
        for text in TEXTS:
            net(torch.tensor([read_tokenizer(model).encode(text)]))
    return seen


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal but for sums that are taken in another order."""
    return torch.allclose(got.float(), want.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_k_and_v_are_measured_where_the_projection_gives_them(kind, tiny_model, texts, tmp_path):
    model = tiny_model(kind)
    got, seen = made(model, tmp_path / "out", texts), float_run(model)
    found = open_checkpoint(tmp_path / "out")
    assert (found.warnings, found.kv_calibrated, len(found.kv)) == ((), "pre-rope", 4)
    for layer in range(4):
        for side in "kv":
            name = f"model.layers.{layer}.self_attn.{side}_proj"
            rows = torch.cat([y[0] for _, y in seen[name]])
            assert close(got[f"{name}.kv_cache_scale"], rows.abs().amax(0) / 127)
            assert not got[f"{name}.kv_cache_offset"].any()


def test_act_method_1_is_a_mean_over_texts(tiny_model, texts, tmp_path):
    """Looked at in the first linears, in front of which nothing is rounded."""
    model = tiny_model("llama")
    got, seen = made(model, tmp_path / "out", texts), float_run(model)
    name = "model.layers.0.self_attn.q_proj"
    low = torch.stack([x.min() for x, _ in seen[name]]).mean()
    high = torch.stack([x.max() for x, _ in seen[name]]).mean()
    assert close(got[f"{name}.input_scale"], (high - low)[None] / 255)


def test_disable_level_leaves_out_the_widest(tiny_model, texts, tmp_path):
    model = tiny_model("llama")
    made(model, tmp_path / "out", texts, "--disable-level", "L3", "--down-proj")
    reach = {}
    for name, calls in float_run(model).items():
        xs = [x.flatten(0, -2) for x, _ in calls]
        spread = max(float((x - (x.amax(0) + x.amin(0))).std()) for x in xs)
        reach[name] = max(float(x.abs().max()) for x in xs) / spread
    reach.pop("lm_head")
    hardest = sorted(reach, key=lambda name: -reach[name])[:3]
    assert set(open_checkpoint(tmp_path / "out").w8a8) == set(reach) - set(hardest)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_the_run(dtype, tiny_model, texts, tmp_path):
    """`config` is what the vendor's script does on an NPU, `float32` what it does on a CPU."""
    kind, source = getattr(torch, dtype), tmp_path / "model"
    shutil.copytree(tiny_model("qwen2"), source)
    stored = {n: t.to(kind) for n, t in load_file(source / "model.safetensors").items()}
    save_file(stored, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    options = ("--act-method", "2", "--anti-method", "m3")
    name = "model.layers.1.self_attn.k_proj"
    half = made(source, tmp_path / "half", texts, *options)
    for part in ("weight_scale", "kv_cache_scale", "bias"):
        assert half[f"{name}.{part}"].dtype is kind
    bits = torch.float32 if dtype == "bfloat16" else torch.int64
    assert half[f"{name}.deq_scale"].dtype is bits
    inputs = kind if dtype == "bfloat16" else torch.float32
    assert half[f"{name}.input_scale"].dtype is inputs
    whole = made(source, tmp_path / "whole", texts, *options, "--dtype", "float32")
    floats = [n for n, t in whole.items() if t.dtype in (torch.float16, torch.bfloat16)]
    assert floats == []
    for out in ("half", "whole"):
        assert open_checkpoint(tmp_path / out).warnings == ()


def test_a_tied_head_has_a_label_and_no_tensor(tiny_model, texts, tmp_path):
    """MsModelSlim cannot save such a model; vllm-ascend wants the label."""
    got = made(tiny_model("llama", tied=True), tmp_path / "out", texts, "--anti-method", "m3")
    assert "lm_head.weight" not in got
    said = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert said["lm_head.weight"] == "FLOAT"
    assert open_checkpoint(tmp_path / "out").warnings == ()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("qwen3", "", "model.layers.0.self_attn.k_norm: norms K, and msModelSlim measures it "
         "before; use --recipe minmax, which measures after RoPE"),
        ("gemma3", "--anti-method m3 --no-use-kvcache-quant",
         "model.layers.0.input_layernorm: has no weight that its "
         "output is a product of; quantize with --anti-method none"),
    ],
)  # fmt: skip
def test_models_that_the_vendor_cannot_do(kind, options, said, tiny_model, texts, tmp_path, capsys):
    model = tiny_model(kind)
    capsys.readouterr()
    common = ("--recipe", "msmodelslim", "--calib-file", str(texts), "-o", str(tmp_path / "out"))
    assert quantize_(str(model), *common, *options.split()) == 1
    assert capsys.readouterr().err == f"error: {said}\n"
    assert [path for path in tmp_path.iterdir() if path != texts] == []
