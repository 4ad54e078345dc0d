"""The short form of a layer: how many launches, the same numbers, and why a site was left alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fused_models import (
    Named,
    Values,
    in_doubles,
    lowered,
    quantized,
    with_exact_linears,
)
from support.onnx_models import DOUBLE_BOUND

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu import legality
from kvc8.backends.npu.launches import launches
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.rewrite import name_of

pytestmark = pytest.mark.slow  # captures models

# Two layers, as the first has no sum before its norm. A head of 32, as the device takes with int8.
SMALL = {"num_hidden_layers": 2, "head_dim": 32}
KINDS = {
    "llama": {},
    "qwen2": {},  # biases
    "qwen3": {},  # norms on q and k
    "mistral": {"sliding_window": None},
    # norms on q and k, heads first, and on either side of each half of a layer; GeGLU
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
}
# 64 query and 4 KV heads of 64: q, k and v are 4608 wide, and 56 query heads fit beside k and v.
WIDE = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    def model(kind: str) -> Path:
        if kind == "wide":
            return tiny_model("llama", tied=True, **WIDE)
        if kind == "wide qwen3":
            return tiny_model("qwen3", tied=True, **WIDE)
        return tiny_model(kind, tied=True, **{**SMALL, **KINDS[kind]})

    return model


def a_layer(program: Program) -> list[int]:
    return [each.total() for each in launches(program).values()]


HALF, BF16 = torch.float16, torch.bfloat16
# kind, dtype, W8A8, linears of it that are float, launches of a layer unfused and fused
COUNTS = [
    ("llama", HALF, True, (), 20, 10),
    ("llama", BF16, True, (), 20, 10),
    ("llama", HALF, True, ("down_proj",), 19, 10),
    ("llama", HALF, False, (), 16, 9),
    ("qwen2", HALF, True, (), 20, 10),
    ("qwen2", HALF, True, ("down_proj",), 19, 10),
    ("qwen2", HALF, False, (), 16, 9),
    ("qwen3", HALF, True, (), 22, 14),
    ("qwen3", HALF, False, (), 18, 13),
    ("mistral", HALF, True, (), 20, 10),
    ("gemma3", HALF, True, (), 24, 17),
    ("gemma3", HALF, False, (), 20, 15),
    ("wide", HALF, True, (), 20, 13),
    ("wide", HALF, False, (), 16, 12),
]


@pytest.mark.parametrize(("kind", "dtype", "w8a8", "keep_float", "unfused", "fused"), COUNTS)
def test_launches_of_a_layer_in_decode(model, kind, dtype, w8a8, keep_float, unfused, fused):
    program = quantized(model(kind), dtype, w8a8=w8a8, zeros=True, keep_float=keep_float)
    for fuse, count in (("off", unfused), ("on", fused)):
        for phase, made in lowered(program, fuse).items():
            legality.check(made, "ascend910b", 128)
            if phase == "decode":
                assert a_layer(made) == [count] * 2


def test_the_twenty_and_the_ten(model):
    program = quantized(model("llama"), torch.float16, w8a8=True, zeros=True)
    unfused, fused = (lowered(program, fuse)["decode"] for fuse in ("off", "on"))
    assert launches(unfused)[1] == Counter(
        npu_rms_norm=2,
        npu_quantize=6,  # before q|k|v, o, gate|up and down; K and V
        npu_quant_matmul=4,
        split_with_sizes=1,  # q|k|v into dense rows
        npu_rotary_mul=2,
        npu_scatter_pa_kv_cache=1,
        npu_fused_infer_attention_score=1,
        add=2,
        npu_swiglu=1,
    )
    assert launches(fused)[1] == Counter(
        npu_add_rms_norm_quant=2,
        npu_quant_matmul=4,
        npu_rope_quant_kvcache=1,
        npu_fused_infer_attention_score=1,
        npu_quantize=1,
        npu_dequant_swiglu_quant=1,
    )
    first = launches(fused)[0]
    assert first["npu_rms_norm_quant"] == first["npu_add_rms_norm_quant"] == 1


# kind, W8A8, zero points in the cache, what a prompt sees of itself
SAME = [
    *((kind, w8a8, True, "int8") for kind in KINDS for w8a8 in (False, True)),
    *(("wide", w8a8, True, "int8") for w8a8 in (False, True)),
    *(("llama", True, False, "float"), ("qwen2", False, False, "float")),
    *(("qwen3", True, False, "float"), ("wide", True, False, "float")),
]


@pytest.mark.parametrize(("kind", "w8a8", "zeros", "prefill_kv"), SAME)
def test_fused_is_unfused_is_the_reference(model, kind, w8a8, zeros, prefill_kv):
    """A prompt and a token: the codes of all three, and the logits.

    What of it each fused op rounds elsewhere is held op by op (test_fusion_contracts.py). With a
    prompt that sees its own float keys the reference is another computation; there the two
    lowerings are compared with each other.
    """
    directory = model(kind)
    program = quantized(directory, torch.float32, w8a8=w8a8, zeros=zeros)
    unfused, fused = (lowered(program, fuse, prefill_kv=prefill_kv) for fuse in ("off", "on"))
    got = in_doubles(fused, directory)
    same(got, in_doubles(unfused, directory))
    if prefill_kv == "int8":
        same(got, in_doubles({"prefill": program, "decode": program}, directory))
        assert sum(int(cache.count_nonzero()) for cache in got[1].values()) > 1000


def same(got: tuple[Values, Named], want: tuple[Values, Named]) -> None:
    """Codes are equal, and so are logits but for the roundings of doubles."""
    assert got[1].keys() == want[1].keys()
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])
    for a, b in zip(got[0], want[0], strict=True):
        assert a.dtype is b.dtype is torch.float64
        assert (a - b).abs().max() <= DOUBLE_BOUND * b.abs().max()


@pytest.mark.parametrize(("kind", "w8a8"), [("llama", True), ("qwen3", False)])
def test_zero_points_at_both_ends_change_nothing_of_that(model, kind, w8a8):
    program = quantized(model(kind), torch.float32, w8a8=w8a8, zeros=True, ends=True)
    reference, unfused, fused = (
        in_doubles(programs, model(kind))
        for programs in (
            {"prefill": program, "decode": program},
            *(lowered(program, fuse, prefill_kv="int8") for fuse in ("off", "on")),
        )
    )
    same(fused, unfused)
    same(fused, reference)
    assert all({-128, 127} <= set(cache.unique().tolist()) for cache in fused[1].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_model_is_the_same_bit_for_bit_in_float16(model, kind):
    """add+norm and rope+quant+cache round where their parts do, and swiglu is not fused."""
    directory = model(kind)
    program = quantized(directory, torch.float16, w8a8=False, zeros=True)
    unfused, fused = (
        with_exact_linears(lowered(program, fuse), directory) for fuse in ("off", "on")
    )
    for a, b in zip(fused[0], unfused[0], strict=True):
        assert a.dtype is torch.float16
        assert torch.equal(a, b)
    assert all(torch.equal(fused[1][name], unfused[1][name]) for name in unfused[1])


def reasons(program: Program, **options: str) -> set[tuple[str, str]]:
    """Why the fusing passes left sites of the second layer alone, in any phase."""
    own = {name_of(step) for step in (*pipeline.LAYER, *pipeline.FUSE)}
    _, told = pipeline.lower_for_npu(program, Options(**options))
    found = {(n, r.why_not) for n, r in told if r.why_not and "layers.1" in r.origin and n in own}
    return {(n, why.partition(" model_")[0]) for n, why in found}


NO_SUM = ("fuse_norm_quant", "it is of no sum, and not read by a single quantizer of one scale")
DIFFERENT = "the linears of its input quantize it by different scales or zero points"
MIXED = "of the linears of its input some are W8A8 and others float"
THROUGH = "its keys pass through npu.{} before they are rotated"
NORMED_APART = (
    "q and k are normalized, and with v 4608 wide; the op takes 4096 at most, in multiples of 64"
)
# kind, options of the model, what is left alone in its second layer
ALONE = [
    ("llama", {}, set()),
    ("qwen3", {}, {NO_SUM}),
    ("wide qwen3", {}, {NO_SUM, ("fuse_rope_quant_cache", NORMED_APART)}),
    (
        "llama",
        {"clipped": ("v_proj",)},
        {
            ("fuse_linears", DIFFERENT),
            ("fuse_rope_quant_cache", THROUGH.format("npu_quant_matmul")),
        },
    ),
    (
        "llama",
        {"keep_float": ("v_proj", "down_proj")},
        {
            ("fuse_linears", MIXED),
            ("fuse_rope_quant_cache", THROUGH.format("npu_quant_matmul")),
            ("fuse_swiglu_quant", "it is not read by a single quantizer of one scale"),
            ("lower_linear", "its weight is float; ATen's linear runs it"),
        },
    ),
    (
        "qwen2",
        {"clipped": ("up_proj",)},
        {
            ("fuse_linears", DIFFERENT),
            ("lower_swiglu", "it is not of the first half of a linear, times the second"),
        },
    ),
]


@pytest.mark.parametrize(("kind", "options", "want"), ALONE)
def test_what_is_left_alone_says_why_and_still_computes_the_same(model, kind, options, want):
    directory = model(kind)
    assert reasons(quantized(directory, torch.float16, w8a8=True, zeros=True, **options)) == want
    program = quantized(directory, torch.float32, w8a8=True, zeros=True, **options)
    reference = in_doubles({"prefill": program, "decode": program}, directory)
    same(in_doubles(lowered(program, "on", prefill_kv="int8"), directory), reference)
