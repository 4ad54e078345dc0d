"""kvc8-compile as a user meets it: what it writes, and what it says when it cannot."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import forked
from support.sparse import LLAMA_70B, LLAMA_405B, write_sparse

from kvc8.backends.npu.artifact import disk_use
from kvc8.backends.npu.artifact_reader import read
from kvc8.ir.shapes import Shapes
from kvc8.ir.text import parse, show
from kvc8.tools import command, opt
from kvc8.tools import compile as tool

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
LLAMA = CHECKPOINTS / "llama_fp16_m3" / "quant"
WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8.safetensors", "quant_model_description.json"
K_SCALE = "model.layers.2.self_attn.k_proj.kv_cache_scale"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(LLAMA, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def compile_(directory: Path, out: Path, *options: str) -> int:
    arguments = [str(directory), "--target", "npu", "-o", str(out), *options]
    return command.entry(tool.parser(), tool.work, arguments)


def refusal(capsys: pytest.CaptureFixture[str], directory: Path, out: Path, *options: str) -> str:
    """The one sentence of a refused compile, which leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    assert compile_(directory, out, *options) == 1
    assert sorted(out.parent.iterdir()) == before
    said = [
        x for x in capsys.readouterr().err.splitlines() if not x.startswith(("warning: ", "  "))
    ]
    assert len(said) == 1
    return said[0].removeprefix("error: ")


def edit_json(path: Path, **changes: object) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**found, **changes}.items() if v is not None}))


def test_an_artifact_is_whole_and_its_dump_reads_back(model, tmp_path, capsys):
    out, dump = tmp_path / "out", tmp_path / "dump"
    assert compile_(model, out, "--dump", str(dump)) == 0
    artifact = read(out)
    for program in artifact.programs.values():
        assert show(parse(show(program))) == show(program)
    names = sorted(str(path.relative_to(dump)) for path in dump.rglob("*.py"))
    assert names[0] == "00-captured.py"
    assert names[-1].startswith("prefill/")
    assert any(re.fullmatch(r"decode/\d\d-remove_cache_copies\.py", name) for name in names)
    shapes = Shapes()
    for path in dump.rglob("*.py"):
        assert show(parse(path.read_text(), shapes)) + "\n" == path.read_text()
    replayed(dump, capsys)


def replayed(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dumped program and the next pass give the next program: what a bug report holds."""
    [after] = dump.glob("chunk/*-lower_paged_attention.py")
    [before] = dump.glob(f"chunk/{int(after.name[:2]) - 1:02}-*.py")
    spelled = after.with_suffix(".txt").read_text().partition(": ")[0]
    assert spelled == "lower_paged_attention{phase=chunk}"
    capsys.readouterr()
    assert command.entry(opt.parser(), opt.work, [str(before), "--passes", spelled]) == 0
    assert capsys.readouterr().out == after.read_text()


def test_a_report_as_json(model, tmp_path, capsys):
    assert compile_(model, tmp_path / "out", "--json", "--batch", "4", "--context", "1000") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes_a_token"] == 512
    decode = found["report"]["phases"]["decode"]
    assert decode["tokens"] == 4
    ops = decode["ops"].values()
    assert sum(op["launches"] for op in ops) == decode["total"]["launches"]
    assert sum(op["share"] for op in ops) == pytest.approx(1)
    assert decode["bytes_a_token"] * 4 == decode["total"]["bytes"]
    assert sum(decode["launches_in_a_layer"].values()) == 4  # layers
    assert decode["unfused"]["launches"] > decode["total"]["launches"]
    assert decode["unfused"]["launches_in_a_layer"] != decode["launches_in_a_layer"]
    cache = decode["total"]["cache_read"] + decode["total"]["cache_written"]
    assert cache == 4 * 512 * (1000 + 1)
    wider = decode["with_float16_cache"]["bytes_a_token"] - decode["bytes_a_token"]
    assert wider == pytest.approx(cache / 4)
    roles = [choice["role"] for choice in found["explain"]["choices"]["decode"]]
    assert "attention over pages" in roles
    assert {"pass": "lower_linear", "sites": 10} in [
        {"pass": each["pass"], "sites": each["sites"]} for each in found["explain"]["left_alone"]
    ]


def test_a_report_and_reasons_as_text(model, tmp_path, capsys):
    options = ("--report", "--explain", "--bandwidth", "0.8", "--block-size", "512")
    assert compile_(model, tmp_path / "out", *options) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decode, 1 of 8,192 tokens: ") for line in said)
    assert sum(line.startswith("total") for line in said) == 3  # phases
    assert said[-1] == (
        "at 0.8 TB/s, 707.8 TOPS in int8, 353.9 TFLOPS in float16 (as given); "
        "a bound from documents; nothing was measured"
    )
    assert (
        "      not _npu_paged_attention: it takes pages equal to query dtype (f16), and this is i8 "
        "(op-plugin PagedAttentionAtb.cpp:37)"
    ) in said


@pytest.mark.parametrize("option", ["report", "explain", "json"])
def test_reports_are_of_the_npu(model, tmp_path, capsys, option):
    said = refusal(capsys, model, tmp_path / "out", "--target", "onnx", f"--{option}")
    assert said == f"--{option}: is of --target npu; leave it out, or compile for npu"


def test_no_config(model, tmp_path, capsys):
    (model / "config.json").unlink()
    assert refusal(capsys, model, tmp_path / "out") == (
        f"{model}: has no config.json; name the directory of a Hugging Face model"
    )


def test_an_unknown_architecture(model, tmp_path, capsys):
    edit_json(model / "config.json", model_type="hal9000")
    said = refusal(capsys, model, tmp_path / "out")
    assert said.startswith("config.json: transformers ")
    assert said.endswith(
        " knows no model_type 'hal9000'; correct it, or install a transformers that does"
    )


def test_a_block_size_that_the_device_does_not_take(model, tmp_path, capsys):
    assert refusal(capsys, model, tmp_path / "out", "--block-size", "100") == (
        "model.layers.0.self_attn: npu_fused_infer_attention_score on ascend910b takes block "
        "size in multiples of 32 up to 512 with pages i8 and cache format ND, and this is 100 "
        "(op-plugin docs/zh/custom_APIs/torch_npu/npu_fused_infer_attention_score.md; "
        "ops-transformer incre_flash_attention_tiling_check.cpp:349); compile with --block-size 96"
    )


def test_heads_that_the_device_does_not_take(tmp_path, capsys):
    small = {"hidden_size": 640, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LLAMA_70B | small | {"num_hidden_layers": 1, "intermediate_size": 640}
    directory = write_sparse(tmp_path / "heads80", config)
    assert refusal(capsys, directory, tmp_path / "out") == (
        "model.layers.0.self_attn: npu_fused_infer_attention_score on ascend910b takes head_dim "
        "in multiples of 32 with pages i8, and this is 80 (op-plugin "
        "docs/zh/custom_APIs/torch_npu/npu_fused_infer_attention_score.md; ops-transformer "
        "incre_flash_attention_tiling_check.cpp:349); pad the heads to 96, or compile for onnx "
        "instead"
    )


def test_a_dtype_that_the_device_does_not_take(model, tmp_path, capsys):
    assert refusal(capsys, model, tmp_path / "out", "--dtype", "float32") == (
        "model.layers.0.input_layernorm: npu_rms_norm_quant on ascend910b takes x dtype f16 or "
        "bf16, and this is f32 (op-plugin docs/zh/custom_APIs/torch_npu/npu_rms_norm_quant.md); "
        "compile with --dtype float16"
    )


def test_an_output_that_exists(model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert refusal(capsys, model, out) == (
        f"{out}: exists already; choose another directory or remove it"
    )


def test_a_model_without_kv_scales(tiny_model, tmp_path, capsys):
    directory = tiny_model("llama")
    capsys.readouterr()
    said = refusal(capsys, directory, tmp_path / "out")
    assert said.startswith("insert_kv_quant: rewrote nothing (k_new_0 (model.layers.0.self_attn)")
    assert said.endswith("; quantize the KV cache of this model first, with kvc8-quantize")


def c8_alone(directory: Path) -> Path:
    """The float model of the golden one, with the KV scales that msModelSlim gave it."""
    float_model = LLAMA.parent / "orig"
    shutil.copytree(float_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(float_model / "model.safetensors")
    labels = dict.fromkeys(tensors, "FLOAT")
    with safe_open(LLAMA / WEIGHTS, framework="pt") as file:
        names = file.keys()
        scales = {name: file.get_tensor(name) for name in names if ".kv_cache_" in name}
    save_file({**tensors, **scales}, directory / "quant_model_weight_c8.safetensors")
    header = {"model_quant_type": "FLOAT", "kv_quant_type": "C8"}
    described = {**header, **labels, **dict.fromkeys(scales, "C8")}
    (directory / DESCRIPTION).write_text(json.dumps(described))
    return directory


def test_c8_without_w8a8_compiles_with_a_warning(tmp_path, capsys):
    directory = c8_alone(tmp_path / "c8")
    assert compile_(directory, tmp_path / "out") == 0
    assert capsys.readouterr().err == (
        f"warning: {directory}/{DESCRIPTION}: the vendor does not support C8 without W8A8; add "
        "W8A8 with kvc8-quantize to run this on the vendor's own stack\n"
    )
    decode = show(read(tmp_path / "out").programs["decode"])
    assert decode.count("npu.npu_fused_infer_attention_score(") == 4
    assert "npu_quant_matmul" not in decode


def test_a_refused_pass_gives_its_reasons(tiny_model, tmp_path, capsys):
    directory = tiny_model("llama")
    capsys.readouterr()
    assert compile_(directory, tmp_path / "out") == 1
    error, *reasons = capsys.readouterr().err.splitlines()
    assert error.startswith("error: insert_kv_quant: rewrote nothing ")
    assert len(reasons) == 5
    assert reasons[1] == (
        "  insert_kv_quant: v_new_0 (model.layers.0.self_attn) left as it was: "
        "the checkpoint has no scale for this cache"
    )
    assert reasons[-1] == "  and 4 more; --traceback shows them all"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # nothing but work() runs
def test_a_killed_compile_leaves_nothing_or_all(model, tmp_path):
    """SIGKILL at moments spread over the whole run."""
    begun, kills = time.monotonic(), 6
    assert compile_(model, tmp_path / "whole") == 0
    took = time.monotonic() - begun
    for i in range(kills):
        out = tmp_path / f"out{i}"
        pid = forked.started(lambda out=out: compile_(model, out))
        time.sleep(took * (i + 1) / kills)
        os.kill(pid, signal.SIGKILL)
        assert forked.ended(pid) in (0, -signal.SIGKILL)
        if out.exists():
            read(out)


@pytest.mark.slow
def test_a_405b_model_of_headers_alone_compiles_in_little_memory(tmp_path):
    """In 0.6 GB."""
    directory, out = write_sparse(tmp_path / "llama405b", LLAMA_405B), tmp_path / "out"
    code = (  # ru_maxrss would be the parent's, where that has more: a child inherits it
        "from pathlib import Path; from kvc8.tools.compile import main; assert main() == 0; "
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    given = [sys.executable, "-c", code, directory, "--target", "npu", "-o", out]
    ran = subprocess.run([*map(str, given)], capture_output=True, text=True, check=True)
    assert ran.stderr == (
        "warning: llama405b: every kv_cache_scale is zero, so the shards hold no data; "
        "the result has the right shape and will not run\n"
    )
    assert "fuse_linears: 252 sites left alone: together they are 106,496 wide, " in ran.stdout
    assert disk_use(out).extra < 50e6
    assert int(ran.stdout.split()[-1]) * 1024 < 0.6e9
