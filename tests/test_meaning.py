"""Numerics: what each pass may do to a program's values, as its contract says."""

from pathlib import Path

import pytest
import torch
from support.onnx_models import captured
from support.steps import step, values

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.ir import npu, ops
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import IRError
from kvc8.ir.expression import make
from kvc8.ir.program import Program
from kvc8.ir.run import run
from kvc8.ir.text import parse
from kvc8.ir.verify import verify
from kvc8.passes.fold_kv_scales import fold_kv_scales
from kvc8.passes.insert_kv_quant import insert_kv_quant
from kvc8.passes.insert_linear_quant import insert_linear_quant
from kvc8.passes.lower_linear import lower_linear
from kvc8.passes.lower_paged_attention import lower_paged_attention
from kvc8.passes.pipeline import QUANTIZE
from kvc8.passes.pipeline import run as run_passes
from kvc8.passes.remove_cache_copies import remove_cache_copies
from kvc8.passes.remove_identities import remove_identities
from kvc8.passes.repair_rope_scales import repair_rope_scales

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
LLAMA = CHECKPOINTS / "llama_fp16_m3" / "quant"  # symmetric
QWEN2 = CHECKPOINTS / "qwen2_fp16_none_asym" / "quant"  # with zero points and biases
UNIT = 2.0**-24  # half of what float32 resolves at 1: one rounding is off by at most this, relative
TOKENS = [5, 9, 17, 33, 65, 12, 101, 7, 44, 3, 250, 18, 90]
TABLE = [[7, 2, 11, 5]]
PAGE = 32  # the smallest block that the NPU's attention takes with an int8 cache


def prefill(program: Program, directory: Path, observe=None) -> list[torch.Tensor]:
    inputs = {**values(program, directory), **step(TOKENS, [0], [len(TOKENS)], TABLE)}
    return run(program, inputs, observe)


def lowering(directory: Path, dtype: torch.dtype = torch.float32) -> Program:
    program = captured(directory, dtype)
    run_passes(program, QUANTIZE)
    fold_kv_scales(program)
    return program


@pytest.mark.parametrize("directory", [LLAMA, QWEN2])
def test_passes_that_are_bit_exact(directory):
    program = captured(directory)
    want = prefill(program, directory)
    for exact in (remove_identities, repair_rope_scales):
        assert exact.contract == "bit_exact"
        exact(program)
        for a, b in zip(prefill(program, directory), want, strict=True):
            assert torch.equal(a, b)
    insert_linear_quant(program)
    insert_kv_quant(program)
    want = prefill(program, directory)
    assert fold_kv_scales.contract == "bit_exact"
    fold_kv_scales(program)
    for a, b in zip(prefill(program, directory), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("directory", [LLAMA, QWEN2])
def test_insert_linear_quant_is_within_half_a_step_of_each_input(directory):
    """Isolated: both linears on one and the same input, against the bound in the pass."""
    program = captured(directory)
    made = values(program, directory)
    insert_linear_quant(program)
    made |= {k: v for k, v in values(program, directory).items() if k not in made}
    seen = []

    def compare(node, value):
        if node.target is not ops.quant_linear:
            return
        x8, w8, deq, bias, _ = node.args
        x, (scale, zero) = observed[x8.args[0]], (made[n.name] for n in x8.args[1:])
        w = made[w8.name].float() * (made[deq.name] / scale)[:, None]
        added = (made[bias.name] + made[w8.name].int().sum(1) * zero) * made[deq.name]
        exact = x.double() @ w.double().T + added.double()
        lo, hi = (scale * (end - zero) for end in (-128, 127))
        clipped = (x - x.clamp(lo, hi)).abs()
        bound = (scale / 2 + clipped).double() @ w.abs().double().T
        # quant_bias is itself rounded to a whole number of deq_scale; then one float32 rounding
        slack = made[deq.name] / 2 + 4 * UNIT * exact.abs()
        assert ((value.double() - exact).abs() <= bound + slack).all()
        seen.append(node.name)

    observed = {}

    def watch(node, value):
        observed[node] = value
        compare(node, value)

    prefill(program, directory, watch)
    assert len(seen) == 24


@pytest.mark.parametrize("directory", [LLAMA, QWEN2])
def test_insert_kv_quant_gives_back_each_value_within_half_a_step(directory):
    program = captured(directory)
    run_passes(program, QUANTIZE)
    made, observed = values(program, directory), {}
    prefill(program, directory, lambda node, value: observed.update({node: value}))
    quantized = program.calls(ops.quantize)
    kv = [node for node in quantized if node.users and next(iter(node.users)).name[1:5] == "_new"]
    assert len(kv) == 8
    for node in kv:
        x, scale = observed[node.args[0]], made[node.args[1].name]
        zero = made[node.args[2].name] if node.args[2] is not None else torch.zeros_like(scale)
        back = (observed[node].float() - zero) * scale
        nearest = x.clamp(scale * (-128 - zero), scale * (127 - zero))
        assert ((back - nearest).abs() <= scale / 2 * (1 + 8 * UNIT) + 2 * UNIT * x.abs()).all()


def test_repaired_scales_bound_every_rotated_key():
    """|k'| <= 127 s' for all positions, where the checkpoint's own scales clip."""
    directory = LLAMA
    program = captured(directory)
    made, rows = {}, []
    repair_rope_scales(program)

    def watch(node, value):
        if node.target is ops.cache_write and node.name.startswith("k_new"):
            made[node.name] = observed[node.args[1]]
        observed[node] = value

    observed = {}
    prefill(program, directory, watch)
    checkpoint = open_checkpoint(directory)
    for layer, cache in enumerate(program.caches()[::2]):
        repaired = make(cache.meta["expression"].args[0], checkpoint.read)
        stored = checkpoint.read(checkpoint.kv[layer][0].scale).float().reshape(2, 32)
        pairs = stored.reshape(2, 2, 16).square().sum(1).sqrt().repeat(1, 2)
        assert torch.allclose(repaired, pairs, rtol=1e-6)
        rows.append((made[f"k_new_{layer}"].abs() > 127.5 * stored).sum().item())
    assert sum(rows) > 0, "the test would not notice a repair that does nothing"


@pytest.mark.parametrize("rows", [1, ops.FEW_ROWS])  # multiplied as whole numbers, and as floats
@pytest.mark.parametrize("code", [-128, 127])
def test_the_widest_sums_of_products_are_exact(rows, code):
    x, w = (torch.full((n, ops.WIDEST), q).to(torch.int8) for n, q in ((rows, -128), (2, code)))
    got = ops.quant_linear(x, w, torch.ones(2), None, torch.float64)
    assert got.eq(torch.tensor(-128 * code * ops.WIDEST).float()).all()


def test_what_is_one_wider_is_refused_for_its_sum_may_reach_2_to_the_31():
    width = ops.WIDEST + 1
    assert width * (-128) ** 2 == 2**31
    text = f"""
    def quantized(x: i8[1, T, {width}], w: i8[2, {width}], scale: f32[2]):
        linear: f32[1, T, 2] = kvc8.quant_linear(x, w, scale, None, f32)
        return [linear]
    """
    with pytest.raises(IRError) as refused:
        verify(parse(text))
    assert str(refused.value) == (
        f"linear: kvc8.quant_linear.default: does not take (i8[1, T, {width}], i8[2, {width}], "
        "f32[2], None, torch.float32) (an int32 sum this wide can overflow); correct the call"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_linear_is_exact_where_the_scale_stays_float32(dtype):
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((5, 64), (48, 64)))
    deq, bias = torch.rand(48) / 100, torch.randint(-999, 999, (48,), dtype=torch.int32)
    want = ops.quant_linear(a, b, deq, bias, dtype)
    code = {torch.float32: 6, torch.bfloat16: 15}[dtype]
    got = npu.npu_quant_matmul(a, b.T, deq, bias=bias, output_dtype=code)
    assert torch.equal(got, want)


def test_lower_linear_in_float16_is_within_one_part_in_1024():
    """The device drops 13 of 23 fraction bits of the scale: at most 2**-10, and one rounding."""
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((5, 64), (48, 64)))
    deq, bias = torch.rand(48) / 100, torch.randint(-999, 999, (48,), dtype=torch.int32)
    exact = (a.long() @ b.long().T + bias).double() * deq.double()
    packed = deq.view(torch.int32).long()
    got = npu.npu_quant_matmul(a, b.T, packed, bias=bias, output_dtype=5).double()
    assert ((got - exact).abs() <= exact.abs() * (2.0**-10 + 2.0**-11) + 2.0**-25).all()


@pytest.mark.parametrize("directory", [LLAMA, QWEN2])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_lower_paged_attention_differs_by_rounding_only(directory, phase):
    """Isolated: the first layer's attention, whose inputs are the same before and after.

    A logit is a sum of D products: off by (D + 2)*UNIT of the sum of their sizes, here called g.
    A weight exp(l - max) is then off by 2*g relative, and by (L + 4)*UNIT for the sum of L of them
    and the division; the output, a mean of values by those weights, by that and L*UNIT more. Twice
    that where both sides round.
    """
    program = lowering(directory)
    lower_linear(program)
    lowered = program.copy()
    lower_paged_attention(lowered, phase=phase, prefill_kv="int8")
    inputs = values(program, directory, block=PAGE)
    start = 0 if phase == "prefill" else len(TOKENS) - 1
    if start:
        before = step(TOKENS[:start], [0], [start], TABLE, block=PAGE)
        results = run(program, {**inputs, **before})
        inputs.update({c.name: r for c, r in zip(program.caches(), results[1:], strict=True)})
    given = step(TOKENS[start:], [start], [len(TOKENS)], TABLE, block=PAGE)
    outputs = []
    for p in (program, lowered):
        seen: dict[str, torch.Tensor] = {}
        now = {**inputs, **values_missing(p, directory, inputs), **given, **host_lists(given)}
        operands: dict[str, tuple[torch.Tensor, ...]] = {}

        def watch(node, value, seen=seen, operands=operands):
            seen[node.name] = value
            if node.target is ops.paged_attention and node.name == "attention_0":
                operands["qkv"] = tuple(seen[n.name] for n in node.args[:3])

        run(p, now, watch)
        first = next(n for n in p.graph.nodes if n.name.startswith("attention_"))
        outputs.append((seen[first.name], operands))
    (want, operands), (got, _) = outputs
    q, k, v = operands["qkv"]
    keys, dim = len(TOKENS), q.shape[-1]
    sizes = q.abs().amax() * k.abs().amax() * dim * dim**-0.5
    bound = 2 * (2 * (dim + 2) * sizes + 2 * keys + 4) * UNIT * v.abs().amax()
    assert (got - want).abs().max() <= bound


def values_missing(program, directory, have):
    checkpoint = open_checkpoint(directory)
    return {
        node.name: make(node.meta["expression"], checkpoint.read)
        for node in program.parameters()
        if node.name not in have
    }


def host_lists(given):
    return {
        "kv_lens": given["seq_lens"].tolist(),
        "query_ends": given["query_starts"][1:].tolist(),
    }


def test_remove_cache_copies_is_bit_exact():
    program = lowering(LLAMA)
    lower_linear(program)
    lower_paged_attention(program, phase="prefill")
    in_place = program.copy()
    remove_cache_copies(in_place)
    given = step(TOKENS, [0], [len(TOKENS)], TABLE)
    results = [
        run(p, {**values(p, LLAMA), **given, **host_lists(given)}) for p in (program, in_place)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
