"""msModelSlim's numbers, from what it recorded: the same on every CPU.

The whole way from a model to its quantized directory goes through products in float16, which CPUs
round in different ways (test_msmodelslim.py). Here each step starts from the vendor's own numbers,
and is held to be exact, or to be within a rounding that is derived.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvc8.tools.quantizer import observers
from kvc8.tools.quantizer.recipes.vendor_math import (
    Params,
    fake_quantized_weight,
    linear_parts,
    params,
)
from kvc8.tools.quantizer.transforms.smoothing import RATIOS, loss_of, scales, scales_by

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
M3, M3_OLD, PLAIN = "llama_fp16_m3", "llama_fp16_m3_mindie_safe_tensor", "qwen2_fp16_none_asym"
QKV = tuple(f"self_attn.{p}_proj" for p in "qkv")
NORMS = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
HALF = 2.0**-11  # what a rounding to float16 moves a number by, relative
SINGLE = 2.0**-24  # and one to float32


@functools.cache
def original(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / (PLAIN if name == PLAIN else M3) / "orig" / "model.safetensors")


@functools.cache
def written(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "quant" / "quant_model_weight_w8a8.safetensors")


def recorded(name: str) -> dict[str, Params]:
    """The quantizer of each linear's input, from the range that the vendor's observer found."""
    seen = json.loads((GOLDEN / name / "run.json").read_text())["observers"]
    ends = {
        name: [torch.tensor([o[end]]) for end in ("x_min", "x_max")] for name, o in seen.items()
    }
    return {module: params(*both, symmetric=False) for module, both in ends.items()}


def smoothing(name: str, norm: str, modules: list[str]) -> Tensor:
    """M3's scales s [in] of a norm: the one float16 a channel that gives the vendor's numbers.

    Those are norm / s, and the codes of weight * s. s is within a few steps of the norms' quotient,
    and no two of them give all the same.
    """
    old, new = original(name)[f"{norm}.weight"], written(name)[f"{norm}.weight"]
    found, count = torch.ones_like(old), torch.zeros(len(old))
    for step in range(-3, 4):
        s = ((old / new).view(torch.int16) + step).view(torch.float16)
        fits = old / s == new
        for module in modules:
            codes = original(name)[f"{module}.weight"] * s / written(name)[f"{module}.weight_scale"]
            codes = codes.round().clamp(-127, 127)
            fits &= (codes == written(name)[f"{module}.weight"]).all(0)
        found, count = torch.where(fits, s, found), count + fits
    assert (count == 1).all()
    return found


def smoothed(name: str) -> dict[str, Tensor]:
    """The weights that the vendor quantized, by module."""
    weights = {n.removesuffix(".weight"): t for n, t in original(name).items()}
    for layer in range(4 if name != PLAIN else 0):
        for norm, linears in NORMS.items():
            modules = [f"model.layers.{layer}.{linear}" for linear in linears]
            s = smoothing(name, f"model.layers.{layer}.{norm}", modules)
            weights |= {module: weights[module] * s for module in modules}
    return weights


@pytest.mark.parametrize("name", [M3, M3_OLD, PLAIN])
def test_every_linear_follows_from_the_ranges_that_were_found(name):
    weights, inputs = smoothed(name), recorded(name)
    assert len(inputs) == 24
    for module, at in inputs.items():
        parts = linear_parts(weights[module], original(name).get(f"{module}.bias"), at)
        for part, got in parts.items():
            want = written(name)[f"{module}.{part}"]
            assert got.dtype is want.dtype, (module, part)
            assert torch.equal(got, want), (module, part)


@functools.cache
def first_inputs(name: str) -> list[Tensor]:
    """What q, k and v of the first layer read of each text [T, in]: no product is before it.

    The norm is taken in float64, so that what is rounded to float16 is the same everywhere.
    """
    table = original(name)["model.embed_tokens.weight"]
    weight = written(name)["model.layers.0.input_layernorm.weight"]
    config = json.loads((GOLDEN / name / "quant" / "config.json").read_text())
    texts = json.loads((GOLDEN / name / "calib.json").read_text())["input_ids"]
    found = []
    for ids in texts:
        x = table[torch.tensor(ids).flatten()].double()
        unit = x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        found.append(unit.half() * weight)
    return found


@pytest.mark.parametrize("name", [M3, M3_OLD, PLAIN])
def test_the_range_of_the_first_inputs_is_the_vendors(name, monkeypatch):
    """Exactly: a histogram's counts are whole, and its search compares sums of 2,048 errors.

    CPUs add them in different orders. The narrowest vectors add 128 of them one after the other in
    16 sums, so a sum is off by 144 roundings at most, and no comparison is that close.
    """
    errors, sums = [], observers._error
    monkeypatch.setattr(observers, "_error", lambda *a: errors.append(sums(*a)) or errors[-1])
    histogram = observers.Histogram()
    for x in first_inputs(name):
        histogram.update(x)
    got = params(*histogram.range(), symmetric=False)
    want = recorded(name)["model.layers.0.self_attn.q_proj"]
    assert (got.scale, got.offset) == (want.scale, want.offset)
    best = float("inf")
    for error in errors:
        assert abs(error - best) > 2 * 144 * SINGLE * error
        best = min(best, error)


def size(parts: list[Tensor]) -> float:
    return sum(float(part.pow(2).mean()) for part in parts) ** 0.5


def root_of_loss(x: Tensor, weights: list[Tensor], s: Tensor) -> float:
    """What m3 makes small, in float64."""
    return size([x @ (w - fake_quantized_weight(w, s)).double().T for w in weights])


def rounding(x: Tensor, weights: list[Tensor], s: Tensor) -> float:
    """How far off such a root can be in float16.

    A loss is of the difference of two products. Each is off by its rounding and by 256 sums in
    float32, and their difference by x's, which is another float16 where the norm before it lies
    near a middle. A root of squares is off by that of the errors' at most (Minkowski).
    """
    off = []
    for weight in weights:
        w, new = weight.double(), fake_quantized_weight(weight, s).double()
        off.append((x @ w.T).abs() * HALF + (x @ new.T).abs() * HALF)
        off[-1] += x.abs() @ (256 * SINGLE * (w.abs() + new.abs()) + 2 * HALF * (w - new).abs()).T
    return size(off)


def ratios(x: Tensor) -> dict[float, Tensor]:
    """The scales of m3 that each ratio gives, in float64."""
    powers = {ratio: x.abs().mean(0).pow(ratio) for ratio in RATIOS}
    return {ratio: s / (s.max() * s.min()).sqrt() for ratio, s in powers.items()}


def test_the_smoothing_of_the_first_norm():
    """Of the vendor, and ours of some of its rows: s of one of the ratios, whose loss is least.

    s is made of the rows' mean size, its power, the power's ends, their product's root and a
    quotient, each rounded to float16; the rows are off by a step of it, two roundings, at most.
    """
    modules = [f"model.layers.0.{linear}" for linear in QKV]
    weights = [original(M3)[f"{module}.weight"] for module in modules]
    vendors = smoothing(M3, "model.layers.0.input_layernorm", modules)
    x = (first_inputs(M3)[0].double() * vendors).half()
    for rows, s in ((x, vendors), (x[:32], scales(x[:32], weights))):
        wanted = ratios(rows.double())
        away = {ratio: float((s / want - 1).abs().max()) for ratio, want in wanted.items()}
        assert min(away.values()) <= (6 + 2) * HALF
        assert sorted(away.values())[1] > 4 * (6 + 2) * HALF  # ratios can be told apart
        given = (rows.double(), weights)
        best = min(wanted.values(), key=lambda each: root_of_loss(*given, each.half())).half()
        off = rounding(*given, s) + rounding(*given, best)
        assert root_of_loss(*given, s) <= root_of_loss(*given, best) + off


@pytest.mark.parametrize("name", [M3, PLAIN])
def test_the_scales_of_the_first_keys_and_values(name):
    """Each channel's reach over all texts, before RoPE, in float64.

    A product in float16 is off by its rounding and that of its bias, by 257 sums in float32, and by
    x as above; a channel's ends as much as its products. A scale rounds a quotient to float16, and
    with an offset a difference before.
    """
    weights, x = smoothed(name), torch.cat(first_inputs(name)).double()
    for side in "kv":
        module = f"model.layers.0.self_attn.{side}_proj"
        product, terms = x @ weights[module].double().T, x.abs() @ weights[module].double().abs().T
        y = product + original(name).get(f"{module}.bias", torch.zeros(1)).double()
        off = (product.abs() + y.abs()) * HALF + terms * (257 * SINGLE + 2 * HALF)
        off, low, high = off.amax(0), y.amin(0).clamp(max=0), y.amax(0).clamp(min=0)
        scale = written(name)[f"{module}.kv_cache_scale"].double()
        offset = written(name)[f"{module}.kv_cache_offset"].double()
        if name == M3:
            reach = torch.maximum(-low, high)
            assert ((scale * 127 - reach).abs() <= off + 2 * HALF * reach).all()
            assert not offset.any()
        else:
            reach = high - low
            assert ((scale * 255 - reach).abs() <= 2 * off + 3 * HALF * reach).all()
            assert ((-low / scale - 128 - offset).abs() <= 0.5 + off / scale + 2 * HALF * 255).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_search_that_sums_no_more_than_it_must_ends_at_the_first_least_loss(dtype, spread):
    """With no spread of channels all ratios give the same scales: the first is taken."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 48, generator=random).sign()
    x = (x * torch.exp(spread * torch.randn(48, generator=random))).to(dtype)
    weights = [torch.randn(rows, 48, generator=random).to(dtype) for rows in (400, 30)]
    pairs = [(weight, torch.nn.functional.linear(x, weight)) for weight in weights]
    size = x.abs().view(-1, 48).mean(0)
    losses = [loss_of(scales_by(size, ratio), x, pairs) for ratio in RATIOS]
    best = RATIOS[losses.index(min(losses))]
    assert (best > 0) == (spread > 0)
    assert torch.equal(scales(x, weights), scales_by(size, best))
