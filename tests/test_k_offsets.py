"""Offsets of K: how they are made, who takes them, and that softmax takes them off."""

import json
import shutil

import pytest
import torch

import kvc8
from kvc8.ir.capture.parameters import whole
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.checkpoint.w8a8 import kv_params_with_offset, kv_scale
from kvc8.ir.errors import ModelError
from kvc8.tools.engines.arithmetic import vllm_decode, vllm_write
from kvc8.tools.quantizer.settings import Settings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_range_with_an_offset_is_held(dtype):
    low = torch.tensor([-1.0, 2.0, -9.0, 99.0, 0.0])
    high = torch.tensor([1.0, 6.0, -8.0, 100.0, 0.0])
    scale, offset = kv_params_with_offset(low, high, dtype)
    assert whole(offset)
    for end in (low, high):
        codes = end / scale.float() + offset.float()
        # An offset is rounded by half a code at most, and the step is never rounded down.
        assert codes.abs().max() <= 127.5 + 1e-3
    symmetric = kv_scale(torch.maximum(-low, high), dtype)
    assert (scale <= symmetric)[:4].all()
    assert scale[1] == kv_scale(torch.tensor(2.0), dtype)  # half of what it holds
    assert offset[0] == 0
    # Far from zero the step is as wide as an offset of 256 asks for: 100 / (256 + 127).
    assert float(scale[3]) == pytest.approx(100 / 383, rel=2**-7)


def test_softmax_takes_an_offset_off_that_vllm_ascend_leaves_in():
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 2, 16, generator=random) + 6
    query = torch.randn(2, 16, generator=random)
    scale, offset = (
        x.view(2, 16)
        for x in kv_params_with_offset(*torch.aminmax(keys.flatten(1), dim=0), torch.float32)
    )
    codes = vllm_write(keys, scale, offset)
    left = vllm_decode(codes, scale, offset, torch.float32).double()
    taken = (codes.double() - offset) * scale
    a, b = (torch.einsum("hd,thd->ht", query.double(), k).softmax(-1) for k in (left, taken))
    # vllm_decode rounds each product once to float32, and softmax moves by twice a logit's error.
    error = torch.einsum("hd,thd->ht", query.double().abs(), left.abs()).max() * 2.0**-24
    assert (a - b).abs().max() < 2 * error
    assert (taken - keys).abs().max() <= scale.max() * 0.5001


def quantized(source, folder, **given):
    texts = folder / "texts.jsonl"
    texts.write_text(json.dumps({"input_ids": [5, 17, 90, 3, 44, 44, 101, 7, 8]}) + "\n")
    settings = Settings(disable=("*",), k_offsets=True, **given)
    return kvc8.quantize(source, out=folder / "out", calibration=texts, settings=settings)


def test_a_directory_has_offsets_of_k_alone(tiny_model, tmp_path):
    source = tiny_model("qwen2", num_hidden_layers=1)  # k_proj has a bias
    quantized(source, tmp_path)
    found = open_checkpoint(tmp_path / "out")
    k, v = (found.read(cache.offset) for cache in found.kv[0])
    assert k.any()
    assert whole(k)
    assert not v.any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"engine": "mindie"},
            "--k-offsets: MindIE makes every offset 0; leave it out, or use --for vllm-ascend",
        ),
        (
            {"recipe": "minmax"},
            "--k-offsets: is not for --recipe minmax; leave it out or use --recipe kvc8",
        ),
    ],
)
def test_who_does_not_take_them(given, said, tiny_model, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(ModelError) as refused:
        quantized(source, tmp_path, **given)
    assert str(refused.value) == said


@pytest.mark.slow
def test_a_soft_cap_is_refused(tiny_model, tmp_path):
    source = tiny_model("gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(ModelError) as refused:
        quantized(source, tmp_path)
    assert str(refused.value) == (
        "model.layers.0.self_attn: has a soft cap in its attention, which an offset of K would "
        "move; leave --k-offsets out"
    )
