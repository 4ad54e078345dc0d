"""Each pass of a layer's lowering and fusion holds its contract, on the program it documents."""

import importlib
from collections.abc import Mapping

import pytest
import torch
from support.pass_docs import PROGRAMS

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu import legality
from kvc8.backends.npu.facts import facts
from kvc8.ir import npu
from kvc8.ir.expression import make
from kvc8.ir.nz import from_nz
from kvc8.ir.program import Program, expression_of
from kvc8.ir.run import run
from kvc8.ir.text import parse, show
from kvc8.passes.fuse_linears import fuse_linears
from kvc8.passes.fuse_norm_quant import fuse_norm_quant
from kvc8.passes.lower_linear import lower_linear
from kvc8.passes.lower_norms import lower_norms

NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
# Half a unit in the last place, relative to the value.
UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
LEAST = {torch.float16: 2.0**-25, torch.bfloat16: 0.0, torch.float32: 0.0}  # among the subnormal
ROWS = 64
HALVES = [torch.float16, torch.bfloat16]
ALL = [*HALVES, torch.float32]
# Zero points up to both ends, and scales under which values saturate or take the middle codes.
QUANTIZERS = [(0.01, -128.0), (0.03, 0.0), (0.02, 127.0), (0.5, 5.0), (0.0005, -3.0)]


def before(name: str, dtype: torch.dtype, *change: str) -> Program:
    """The program that a pass documents, in another dtype, with one text in place of another."""
    found = PROGRAMS.search(importlib.import_module(f"kvc8.passes.{name}").__doc__ or "")
    assert found
    text = found[2].replace("f16", NAMES[dtype])
    assert not change or change[0] in text
    return parse(text.replace(*change) if change else text)


def results(
    name: str,
    dtype: torch.dtype,
    stored: Mapping[str, torch.Tensor],
    given: Mapping[str, object],
    *change: str,
) -> list[list[torch.Tensor]]:
    """What the program gives before the pass and after it."""
    program = before(name, dtype, *change)
    after = program.copy()
    getattr(importlib.import_module(f"kvc8.passes.{name}"), name)(after)
    made = []
    for p in (program, after):
        parameters = {
            n.name: make(n.meta["expression"], stored.__getitem__) for n in p.parameters()
        }
        # what is written in place is not shared by the two
        own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        made.append(run(p, {**parameters, **own}))
    return made


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    return made.to(dtype)


def gap(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("dtype", ALL)
def test_lower_norms(dtype):
    """ATen rounds twice and the op once: 3 units of the value, and of what is too small."""
    weight = noise(64, dtype=dtype, seed=1)
    x = noise(1, ROWS, 64, dtype=dtype)
    [want], [got] = results("lower_norms", dtype, {"w": weight}, {"x": x})
    if dtype is torch.float32:
        assert torch.equal(got, want)
    bound = 3 * UNITS[dtype] * 1.01 * want.float().abs() + LEAST[dtype] * (1 + weight.float().abs())
    assert ((got.float() - want.float()).abs() <= bound).all()


GEMMA = """\
    to_1: f32[64] = aten.to.dtype(w, f32)
    total: f32[64] = aten.add.Tensor(to_1, 1.0)
    mul_1: f32[1, T, 64] = aten.mul.Tensor(mul, total)
    type_as: f16[1, T, 64] = aten.type_as(mul_1, x)
    return [type_as]
"""


@pytest.mark.parametrize("dtype", ALL)
def test_lower_norms_of_one_plus_a_weight(dtype):
    """ATen rounds once; the op rounds 1 + w, and the result once."""
    weight = noise(64, dtype=dtype, seed=1)
    x = noise(1, ROWS, 64, dtype=dtype)
    text = before("lower_norms", torch.float16)
    lines = show(text).splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if "to_1" in line)
    program = parse(("".join(lines[:start]) + GEMMA).replace("f16", NAMES[dtype]))
    after = program.copy()
    lower_norms(after)
    assert [npu.npu_rms_norm] == [n.target for n in after.graph.nodes if "npu" in str(n.target)]
    want, got = (
        run(
            p,
            {"x": x, **{n.name: make(expression_of(n), lambda _: weight) for n in p.parameters()}},
        )[0]
        for p in (program, after)
    )
    if dtype is torch.float32:
        assert torch.equal(got, want)
    bound = 3 * UNITS[dtype] * 1.01 * want.float().abs() + LEAST[dtype] * 2
    assert ((got.float() - want.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ALL)
def test_lower_rope(dtype):
    """float16 and float32 in the same steps; bfloat16 three roundings against one."""
    q, angle = noise(1, ROWS, 4, 8, dtype=dtype), noise(1, ROWS, 8, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    [want], [got] = results("lower_rope", dtype, {}, {"q": q, "c": cos, "s": sin})
    if dtype is not torch.bfloat16:
        assert torch.equal(got, want)
    turned = torch.cat([q[..., 4:], q[..., :4]], -1).float()
    sizes = q.float().abs() * cos.float().abs()[:, :, None]
    sizes = sizes + turned.abs() * sin.float().abs()[:, :, None]
    # each product by a unit of its size, and each of the two sums by one of theirs
    assert ((got.float() - want.float()).abs() <= 3 * UNITS[dtype] * 1.01 * sizes).all()


@pytest.mark.parametrize("dtype", ALL)
def test_lower_swiglu(dtype):
    """ATen rounds silu and the product, the op the product alone."""
    x = noise(1, ROWS, 64, dtype=dtype)
    [want], [got] = results("lower_swiglu", dtype, {}, {"x": x})
    if dtype is torch.float32:
        assert torch.equal(got, want)
    small = LEAST[dtype] * (1 + x.float().abs().max())
    bound = 3 * UNITS[dtype] * 1.01 * want.float().abs() + small
    assert ((got.float() - want.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ALL)
def test_lower_geglu(dtype):
    """Op and ATen round gelu and the product; in bfloat16 the op rounds the product alone.

    Inside, gelu is gate/2 * (1 + tanh), all float32: where tanh comes near -1 it is off by some
    units of 1, whoever computes it, four here, which half the gate and up multiply.
    """
    x = noise(1, ROWS, 64, dtype=dtype)
    [want], [got] = results("lower_geglu", dtype, {}, {"x": x})
    gate, up = x.double().chunk(2, -1)
    small = LEAST[dtype] * (1 + x.double().abs().max()) + 2.0**-23 * (gate * up).abs()
    off = (got.double() - want.double()).abs()
    assert (off <= 3 * UNITS[dtype] * 1.01 * want.double().abs() + small).all()
    if dtype is torch.bfloat16:
        once = torch.nn.functional.gelu(gate, approximate="tanh") * up
        off = (got.double() - once).abs()
        assert (off <= 1.01 * UNITS[dtype] * once.abs() + small).all()


@pytest.mark.parametrize("dtype", ALL)
def test_fuse_linears_is_bit_exact_where_linears_are_w8a8(dtype):
    random = torch.Generator().manual_seed(0)
    stored = {"is": torch.tensor([0.03]), "io": torch.tensor([-7.0])}
    for name in ("g", "u"):
        stored[name] = torch.randint(-127, 128, (96, 64), generator=random, dtype=torch.int8)
        scale = torch.rand(96, generator=random) / 1000
        stored[f"{name}d"] = scale.view(torch.int32).long()
        bias = torch.randint(-999, 999, (96,), generator=random, dtype=torch.int32)
        stored[f"{name}b"] = bias
    x = noise(1, ROWS, 64, dtype=dtype)
    want, got = results("fuse_linears", dtype, stored, {"x": x})
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("width", "apart"), [(32767, False), (32768, True), (53248, True)])
def test_linears_that_no_product_takes_together_are_left_apart(width, apart):
    """Gate and up of Llama 3.1 405B are legal alone; the limit is that of the legality table."""
    text = show(before("fuse_linears", torch.float16))
    program = parse(text.replace("[96", f"[{width}").replace("T, 96]", f"T, {width}]"))
    [remark] = fuse_linears(program)
    why = f"together they are {2 * width:,} wide, and npu_quant_matmul is at most 65,535"
    assert remark.why_not == (why if apart else "")
    lower_linear(program)
    rows = legality.limits("ascend910b")["npu_quant_matmul"]
    found = [facts(call, 128) for call in program.calls(npu.npu_quant_matmul)]
    assert [f["outer size"] for f in found] == ([width] * 2 if apart else [2 * width])
    assert not [broken for f in found for broken in legality.breaks("npu_quant_matmul", rows, f)]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("scale", "zero"), QUANTIZERS)
def test_fuse_norm_quant(dtype, scale, zero):
    """The bounds of the pass: codes by how much each fused op rounds elsewhere, and exact sums."""
    stored = {
        "w": noise(64, dtype=dtype, seed=1),
        "is": torch.tensor([scale]).to(dtype),  # as a checkpoint of that dtype has it
        "io": torch.tensor([zero]),
    }
    given = {"a": noise(1, ROWS, 64, dtype=dtype, seed=2), "b": noise(1, ROWS, 64, dtype=dtype)}
    want, got = results("fuse_norm_quant", dtype, stored, given)
    most = {torch.float32: (0, 1), torch.float16: (1, 1), torch.bfloat16: (3, 3)}[dtype]
    assert gap(got[0], want[0]) <= most[0]
    assert gap(got[1], want[1]) <= most[1]
    assert torch.equal(got[2], want[2])  # a norm without a quantizer; its input is the first sum


def test_a_norm_over_several_dimensions_is_not_fused_with_its_quantizer():
    """npu_rms_norm is over all dimensions of its weight, npu_rms_norm_quant over the last."""
    text = """
def lowered(
    x: f16[T, 4, 64],
    w: f16[4, 64] = stored("w"),
    s: f32[1] = stored("is"),
    z: i32[1] = cast(stored("io"), i32),
):
    norm: (f16[T, 4, 64], f32[T, 1, 1]) = npu.npu_rms_norm(x, w, 1e-05)
    normed: f16[T, 4, 64] = norm[0]
    x8: i8[T, 4, 64] = npu.npu_quantize(normed, s, z, 1, -1, True)
    return [x8]
"""
    program = parse(text)
    [remark] = fuse_norm_quant(program)
    assert remark.why_not == "it is over several dimensions, and npu_rms_norm_quant over the last"
    assert show(program) == show(parse(text))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("scale", "zero"), QUANTIZERS)
def test_fuse_swiglu_quant(dtype, scale, zero):
    stored = {"is": torch.tensor([scale]), "io": torch.tensor([zero])}
    x = noise(1, ROWS, 64, dtype=dtype)
    [want], [got] = results("fuse_swiglu_quant", dtype, stored, {"x": x})
    assert gap(got, want) <= (0 if dtype is torch.float32 else 1)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("zero", [-128, 0, 127])
@pytest.mark.parametrize("k_zero", ["None", "vz"])
def test_fuse_rope_quant_cache(dtype, zero, k_zero):
    """Queries and codes, in a cache that has slots nobody writes, and tokens without a slot."""
    angle = noise(1, ROWS, 16, seed=1)
    rows = {"q": 32, "k": 16, "v": 16}
    stored = {name: noise(n, 64, dtype=dtype, seed=n) / 8 for name, n in rows.items()}
    for name in ("ks", "vs"):
        stored[name] = noise(16, seed=5).abs() / 32 + 0.01
    stored["vz"] = torch.full((16,), zero, dtype=torch.int32)
    slots = torch.randperm(4 * 32, generator=torch.Generator().manual_seed(0))[:ROWS]
    slots[7] = -1
    caches = torch.randint(-128, 128, (2, 4, 32, 1, 16), dtype=torch.int8)
    given = {
        "x": noise(1, ROWS, 64, dtype=dtype),
        "slots": slots.int(),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "k_cache_0": caches[0],
        "v_cache_0": caches[1],
    }
    change = "npu_quantize(k_flat, ks, None", f"npu_quantize(k_flat, ks, {k_zero}"
    want, got = results("fuse_rope_quant_cache", dtype, stored, given, *change)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[3], want[3])  # V is not rotated
    assert gap(got[2], want[2]) <= (1 if dtype is torch.bfloat16 else 0)
    assert torch.equal(got[1], -got[2])  # who reads the cache sees what was written
    assert (want[2] != caches[0]).any()


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("zero", [-128, 0, 127])
@pytest.mark.parametrize("k_zero", ["None", "vz"])
def test_fuse_norm_rope_quant_cache(dtype, zero, k_zero):
    """V's codes are the same; queries and K's codes as far as the pass's module says."""
    angle = noise(1, ROWS, 128, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    stored = {name: noise(128, dtype=dtype, seed=i) for i, name in enumerate(("qw", "kw"))}
    stored |= {name: noise(128, seed=5).abs() / 32 + 0.01 for name in ("ks", "vs")}
    stored["vz"] = torch.full((128,), zero, dtype=torch.int32)
    slots = torch.randperm(4 * 32, generator=torch.Generator().manual_seed(0))[:ROWS]
    slots[7] = -1
    caches = torch.randint(-128, 128, (2, 4, 4, 32, 32), dtype=torch.int8)
    qkv = noise(1, ROWS, 512, dtype=dtype)
    given = {"qkv": qkv, "slots": slots.int(), "cos": cos, "sin": sin}
    given |= {"k_cache_0": caches[0], "v_cache_0": caches[1]}
    change = "npu_quantize(k_flat, ks, None", f"npu_quantize(k_flat, ks, {k_zero}"
    want, got = results("fuse_norm_rope_quant_cache", dtype, stored, given, *change)
    assert torch.equal(got[2], want[2])  # V is neither normalized nor rotated
    assert (want[1] != caches[0]).any()
    roundings = {torch.float32: 0, torch.float16: 4, torch.bfloat16: 2}[dtype]
    unit = roundings * UNITS[dtype] * 1.01

    def sizes(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """|cos n| + |sin n'| of the normalized x, [ROWS, heads, 128]."""
        heads = x.float().unflatten(-1, (-1, 128))[0]
        normed = (heads / heads.square().mean(-1, keepdim=True).sqrt() * gamma.float()).abs()
        turned = torch.cat([normed[..., 64:], normed[..., :64]], -1)
        return (normed * cos[0, :, None].float().abs()) + (turned * sin[0, :, None].float().abs())

    moved = (got[0].float() - want[0].float()).abs()[0]
    last = UNITS[dtype] * 1.01 * want[0].float().abs()[0] if roundings else 0  # the op rounds too
    assert (moved <= unit * sizes(qkv[..., :256], stored["qw"]) + last + LEAST[dtype] * 8).all()
    most = unit * sizes(qkv[..., 256:384], stored["kw"])[:, 0] / stored["ks"]
    codes = [
        from_nz(cache, 1).flatten(0, 1)[slots[slots >= 0], 0].int() for cache in (got[1], want[1])
    ]
    limit = most[slots >= 0] + (1 if roundings else 0)
    assert ((codes[0] - codes[1]).abs() <= limit).all()
