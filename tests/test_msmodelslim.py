"""kvc8-quantize --recipe msmodelslim: what msModelSlim writes, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvc8.tools import command, quantize

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
    assert set(got) == set(want)
    wrong = [n for n, t in want.items() if t.dtype != got[n].dtype or not torch.equal(t, got[n])]
    assert wrong == []
    [description] = [path.name for path in (golden / "quant").glob("quant_model_description*")]
    for file in (description, "config.json"):
        new, old = (json.loads((d / file).read_text()) for d in (out, golden / "quant"))
        assert list(new.items()) == list(old.items())
