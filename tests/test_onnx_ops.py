"""Each op of a program gives in ONNX Runtime what it gives on a CPU, codes bit for bit."""

import pytest
import torch
from support.onnx_models import UNIT, both, compiled

from kvc8.ir import ops
from kvc8.ir.text import parse

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


QUANTIZE_TEXT = """
def quantized(x: {dtype}[T, 2, 4], scale: f32[{shape}], zero: f32[{shape}]):
    quantize: i8[T, 2, 4] = kvc8.quantize(x, scale, {zero})
    return [quantize]
"""


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("shape", ["2, 4", "1", "2, 1"])
@pytest.mark.parametrize("zero", [None, 3.0, -128.0, 0.5])
def test_quantize_is_exact_at_ties_and_at_the_ends(dtype, shape, zero, stored, tmp_path):
    sizes = [int(d) for d in shape.split(",")]
    scale = 2.0 ** torch.arange(-3, -3 + len(torch.zeros(sizes).flatten())).reshape(sizes)
    halves = torch.arange(-600, 600) / 2  # every code, every tie and both ends
    x = halves[:, None, None] * scale.expand(1, 2, 4)
    random = torch.randn(4000, 2, 4, generator=torch.Generator().manual_seed(2)) * 9
    x = torch.cat(
        [x, random, torch.tensor([-0.0, float("inf"), float("-inf"), 6e4]).repeat(1, 2, 1)]
    )
    x = x.half() if dtype == "f16" else x
    text = QUANTIZE_TEXT.format(dtype=dtype, shape=shape, zero="zero" if zero else None)
    session = compiled(parse(text), stored, tmp_path / "out")
    for factor in (1.0, 0.7130217):  # exact ties, and quotients that are rounded
        given = {"x": x, "scale": scale * factor, "zero": torch.full(sizes, zero or 0.0)}
        want = ops.quantize(x, given["scale"], given["zero"] if zero else None)
        assert {-128, 127} <= set(want.flatten().tolist())
        assert torch.equal(session.run(given)[0], want)


def test_quantize_linear_would_be_wrong_at_ties_with_an_odd_zero_point():
    """Why zero points take Div, Add, Round, Clip: what ONNX's op would have computed instead."""
    x, scale, zero = torch.tensor([0.5, 1.5]), torch.ones(1), torch.tensor([3.0])
    onnx_says = x.round() + 3
    assert ops.quantize(x, scale, zero).tolist() == [4, 4]
    assert onnx_says.tolist() == [3, 5]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("shape", ["2, 4", "4", "1"])
@pytest.mark.parametrize("zero", [None, 3.0, 0.5])
def test_dequantize_is_exact(dtype, shape, zero, stored, tmp_path):
    q = torch.arange(-128, 128).to(torch.int8)[:, None, None].expand(256, 2, 4).contiguous()
    given_zero = "zero" if zero else None
    text = f"""
    def quantized(q: i8[T, 2, 4], scale: f32[{shape}], zero: f32[{shape}]):
        dequantize: {dtype}[T, 2, 4] = kvc8.dequantize(q, scale, {given_zero}, {dtype})
        return [dequantize]
    """
    sizes = [int(d) for d in shape.split(",")]
    scale = torch.rand(sizes, generator=torch.Generator().manual_seed(3))
    given = {"q": q, "scale": scale, "zero": torch.full(sizes, zero or 0.0)}
    [want], [got] = both(text, stored, tmp_path / "out", given)
    assert torch.equal(want, got)


@pytest.mark.parametrize("bias", ["added", None])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_quant_linear_is_exact_at_the_largest_sums(bias, dtype, stored, tmp_path):
    """Neighbors of 127 and -128 add up to more than int16 holds."""
    text = f"""
    def quantized(x: i8[1, T, 4096], w: i8[6, 4096], deq: f32[6], added: i32[6]):
        linear: {dtype}[1, T, 6] = kvc8.quant_linear(x, w, deq, {bias}, {dtype})
        return [linear]
    """
    random = torch.Generator().manual_seed(4)
    x = torch.randint(-128, 128, (1, 32, 4096), generator=random, dtype=torch.int8)
    x[0, 0], x[0, 1], x[0, 2] = 127, -128, -127
    w = torch.randint(-128, 128, (6, 4096), generator=random, dtype=torch.int8)
    w[0], w[1] = 127, -128
    deq = torch.rand(6, generator=random) * 1e-4
    added = torch.randint(-(2**20), 2**20, (6,), generator=random, dtype=torch.int32)
    given = {"x": x, "w": w, "deq": deq, "added": added}
    [want], [got] = both(text, stored, tmp_path / "out", given)
    assert torch.equal(want, got)


@pytest.mark.parametrize("slots", [[3, -1, 0, 23, -1], [-1] * 5, [23, 22, 21, 0, 7]])
@pytest.mark.parametrize(("name", "dtype"), [("i8", torch.int8), ("f16", torch.float16)])
def test_slot_minus_one_writes_nothing(slots, name, dtype, stored, tmp_path):
    text = f"""
    def captured(rows: {name}[T, 2, 4], slots: i32[T], cache: {name}[N, S, 2, 4] = cache()):
        new: {name}[N, S, 2, 4] = kvc8.cache_write(cache, rows, slots)
        return [rows, new]
    """
    rows, cache = (torch.arange(n * 8).reshape(-1, 2, 4) % 99 for n in (5, 24))
    given = {"rows": (rows + 100).to(dtype), "slots": torch.tensor(slots, dtype=torch.int32)}
    given["cache"] = cache.to(dtype).reshape(6, 4, 2, 4)
    (_, got) = compiled(parse(text), stored, tmp_path / "out").run(given)
    assert torch.equal(got, ops.cache_write(given["cache"], given["rows"], given["slots"]))


def test_a_session_keeps_its_caches_also_beside_outputs_that_are_watched(stored, tmp_path):
    text = """
    def captured(rows: f32[T, 2, 4], slots: i32[T], cache: f32[N, S, 2, 4] = cache()):
        neg: f32[T, 2, 4] = aten.neg(rows)
        new: f32[N, S, 2, 4] = kvc8.cache_write(cache, neg, slots)
        return [rows, neg, new]
    """
    session = compiled(parse(text), stored, tmp_path / "out")
    session.allocate(blocks=3, block_size=2)
    rows, want = torch.ones(1, 2, 4), torch.zeros(6, 2, 4)
    for slot in (4, 1, 5):
        given = {"rows": rows * slot, "slots": torch.tensor([slot], dtype=torch.int32)}
        same, seen, cache = session.run(given)
        want[slot] = -slot
        assert torch.equal(same, rows * slot)
        assert torch.equal(seen, -same)
        assert torch.equal(cache.flatten(0, 1), want)


ATTENTION_TEXT = """
def captured(
    q: {dtype}[T, 6, 8],
    k: {dtype}[N, S, 2, 8],
    v: {dtype}[N, S, 2, 16],
    table: i32[B, M],
    lens: i32[B],
    starts: i32[B + 1],
    sinks: {dtype}[6],
):
    out: {dtype}[T, 6, 16] = kvc8.paged_attention(q, k, v, table, lens, starts, {how})
    return [out]
"""
HOW = {
    "plain": "0.35, 0, 0.0, None",
    "window": "0.35, 3, 0.0, None",
    "softcap": "0.35, 0, 0.8, None",
    "sinks": "0.35, 0, 0.0, sinks",
    "all": "0.35, 4, 0.8, sinks",
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_paged_attention_reads_what_belongs_to_it_and_nothing_else(how, dtype, stored, tmp_path):
    """A prefill, an empty sequence, a decode step and a continued prefill, then padding.

    What no sequence owns is NaN, and the tables hold nonsense past each end. Sums are of 8 and of
    at most 13 terms of size 1, and logits of up to 8*9*0.35: at most 100 roundings.
    """
    kind = {"f32": torch.float32, "f16": torch.float16}[dtype]
    random = torch.Generator().manual_seed(5)
    nan = float("nan")
    k, v = (torch.full((16, 4, 2, d), nan, dtype=kind) for d in (8, 16))
    tables, lens = [[7, 2, -1, 999], [3, 999, -1, -1], [5, 0, 15, -7], [9, 8, 4, -1]], [5, 4, 12, 9]
    for table, end in zip(tables, lens, strict=True):
        for p in range(end):
            for cache in (k, v):
                at = torch.randn(cache.shape[2:], generator=random).clamp(-3, 3)
                cache[table[p // 4], p % 4] = at.to(kind)
    i32 = torch.int32
    given = {
        "q": torch.randn(14, 6, 8, generator=random).clamp(-3, 3).to(kind),
        "k": k,
        "v": v,
        "table": torch.tensor(tables, dtype=i32),
        "lens": torch.tensor(lens, dtype=i32),
        "starts": torch.tensor([0, 5, 5, 6, 12], dtype=i32),
        "sinks": torch.randn(6, generator=random).to(kind),
    }
    text = ATTENTION_TEXT.format(dtype=dtype, how=HOW[how])
    [want], [got] = both(text, stored, tmp_path / "out", given)
    assert torch.isfinite(want).all()
    rounding = 100 * UNIT if kind is torch.float32 else 2.0**-10
    assert (want.float() - got.float()).abs().max() <= rounding * 3
    assert (got[12:] == 0).all()


ELEMENTS = {
    "square": "y: f32[T, 3, 64] = aten.square(x)",
    "floor": "y: f32[T, 3, 64] = aten.floor(x)",
    "stacked last": "y: f32[T, 3, 64, 2] = aten.stack([x, x], -1)",
    "stacked in the middle": "y: f32[T, 2, 3, 64] = aten.stack([x, x], 1)",
    "squeezed": """o: f32[T, 1, 64] = aten.slice.Tensor(x, 1, 0, 1)
        y: f32[T, 64] = aten.squeeze(o)""",
    "numbers in steps": """n: f32[64] = aten.arange.start_step(1, 129, 2, dtype=f32)
        y: f32[T, 3, 64] = aten.add.Tensor(x, n)""",
    "one over": "y: f32[T, 3, 64] = aten.reciprocal(x)",
    "clamped": "y: f32[T, 3, 64] = aten.clamp(x, -2.5, 3.0)",
    "clamped below": "y: f32[T, 3, 64] = aten.clamp(x, -2.5)",
    "lesser": "y: f32[T, 3, 64] = aten.minimum(x, w)",
    "one or the other": """k: b8[T, 3, 64] = aten.gt.Scalar(x, 0.5)
        y: f32[T, 3, 64] = aten.where.self(k, x, w)""",
    "largest of a dimension": """p: (f32[T, 3, 1], i64[T, 3, 1]) = aten.max.dim(x, -1, True)
        y: f32[T, 3, 1] = p[0]""",
    "where the largest is": """p: (f32[T, 3], i64[T, 3]) = aten.max.dim(x, 2)
        y: i64[T, 3] = p[1]""",
    "absolute, at least": """a: f32[T, 3, 64] = aten.abs(x)
        y: f32[T, 3, 64] = aten.clamp.Tensor(a, w, None)""",
    "at most": "y: f32[T, 3, 64] = aten.clamp.Tensor(x, None, w)",
    "one after the other": "y: f32[T, 6, 64] = aten.concat([x, x], 1)",
    "repeat a middle dimension": "y: f32[T, 6, 64] = aten.repeat_interleave.self_int(x, 2, 1)",
    "repeat the last dimension": "y: f32[T, 3, 128] = aten.repeat_interleave.self_int(x, 2, -1)",
    "repeat an unknown number": "y: f32[3*T, 3, 64] = aten.repeat_interleave.self_int(x, 3, 0)",
}
ROUNDED = {
    "a number to powers": """s: f32[T, 3, 64] = aten.mul.Tensor(x, 0.01)
        y: f32[T, 3, 64] = aten.pow.Scalar(10000.0, s)""",
    "a bias and a product": """r: f32[T, 3, 64] = aten.mul.Tensor(x, 0.1)
        a: f32[T, 64] = aten.select.int(r, 1, 0)
        m: f32[64, 1] = aten.reshape(w, [64, 1])
        e: f32[64, 64] = aten.mul.Tensor(m, v)
        y: f32[T, 64] = aten.addmm(v, a, e)""",
    "log": """p: f32[T, 3, 64] = aten.square(x)
        y: f32[T, 3, 64] = aten.log(p)""",
    "expm1": "y: f32[T, 3, 64] = aten.expm1(x)",
    "expm1 near zero": """s: f32[T, 3, 64] = aten.mul.Tensor(x, 1e-08)
        e: f32[T, 3, 64] = aten.expm1(s)
        y: f32[T, 3, 64] = aten.div.Tensor(e, 1e-08)""",
    "softplus": "y: f32[T, 3, 64] = aten.softplus(x)",
    "softplus, sharper": "y: f32[T, 3, 64] = aten.softplus(x, 4.0, 20.0)",
    "layer norm": "y: f32[T, 3, 64] = aten.layer_norm(x, [64], w, v, 1e-05)",
    "layer norm without bias": "y: f32[T, 3, 64] = aten.layer_norm(x, [64], w)",
    "layer norm of nothing": "y: f32[T, 3, 64] = aten.layer_norm(x, [64])",
}


def one_call(line, stored, out):
    text = f"""
    def quantized(x: f32[T, 3, 64], w: f32[64], v: f32[64]):
        {line}
        return [y]
    """
    random = torch.Generator().manual_seed(5)
    given = {"x": torch.randn(7, 3, 64, generator=random) * 9}
    given |= {name: torch.randn(64, generator=random) for name in "wv"}
    [want], [got] = both(text, stored, out, given)
    return want, got


@pytest.mark.parametrize("line", ELEMENTS.values(), ids=ELEMENTS)
def test_what_rounds_in_one_way_only_is_exact(line, stored, tmp_path):
    want, got = one_call(line, stored, tmp_path / "out")
    assert torch.equal(want, got)


@pytest.mark.parametrize("line", ROUNDED.values(), ids=ROUNDED)
def test_what_rounds_in_between_is_off_by_its_roundings(line, stored, tmp_path):
    """Sums of 64 twice, and at most 16 steps more, by each of the two; of values of size 4 or less
    before the last step, or of the result's size.
    """
    want, got = one_call(line, stored, tmp_path / "out")
    most = 2 * (2 * 64 + 16) * UNIT * max(4.0, float(want.abs().max()))
    assert float((want - got).abs().max()) <= most
