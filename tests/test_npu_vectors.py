"""Emulated NPU ops give what the vendor's golden functions give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvc8.backends.npu.emulation import attention, matmul, quantization, scaled_attention
from kvc8.ir import npu
from kvc8.tools.device_checker import vectors
from kvc8.tools.device_checker.vectors import ATB_OPERATIONS, GOLDEN, Case

CASES, PRIMARY = vectors.cases(GOLDEN), vectors.primary(GOLDEN)

# The one golden that its kernel contradicts: it multiplies by the scale and clamps at 10.
CONTRADICTED = {"npu_rope_quant_kvcache__VARIANT_opplugin_multiply_clamp0_10"}


def passes(case: Case) -> bool:
    """Whether the emulation gives what the vendor's golden function gave."""
    stored, expected = vectors.load(case, GOLDEN)
    inputs = {name: tensor.clone() for name, tensor in stored.items()}  # some ops write to theirs
    return vectors.passes(case, vectors.run(case, inputs), expected)


@pytest.mark.parametrize("name", sorted(PRIMARY))
def test_vector(name: str) -> None:
    assert passes(PRIMARY[name])


def test_nothing_is_left_out_but_what_its_kernel_contradicts() -> None:
    ops = {schema.partition("(")[0].split("::")[1] for schema in npu.SCHEMAS}
    assert {case["fn"] for case in PRIMARY.values()} <= ops | set(ATB_OPERATIONS)
    assert set(CASES) - set(PRIMARY) == CONTRADICTED
    assert len(PRIMARY) == 93


DEQUANTIZE = scaled_attention.dequantize


def _minus(offset: torch.Tensor | None) -> torch.Tensor | None:
    return None if offset is None else -offset


MUTANTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "offset sign in attention": (
        scaled_attention,
        "dequantize",
        lambda codes, scale, offset, out: DEQUANTIZE(codes, scale, _minus(offset), out),
        "npu_fused_infer_attention_score__paged_bf16_asym_bs128_d128",
    ),
    "heads interleaved": (
        attention,
        "attend_codes",
        lambda q, k, v, *args, **kwargs: scaled_attention.attend_codes(
            q.flip(1), k, v, *args, **kwargs
        ),
        "npu_fused_infer_attention_score__bsh_fp16_sym_gqa4to2",
    ),
    "truncation for rounding": (
        quantization,
        "saturate",
        lambda value, dtype=torch.int8: value.trunc().clamp(-128, 127).to(dtype),
        "npu_quantize__div_fp16_perchannel_i32zp_axis0",
    ),
    "wrap for saturation": (
        quantization,
        "saturate",
        lambda value, dtype=torch.int8: value.round().to(torch.int32).to(dtype),
        "npu_quantize__mul_fp16_saturate",
    ),
    "packed offset ignored": (
        matmul,
        "unpack_offset",
        lambda packed: torch.zeros(packed.shape),
        "npu_quant_matmul__int8_i64_requant_offset",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, replacement, name = MUTANTS[mutant]
    assert passes(PRIMARY[name])
    monkeypatch.setattr(module, function, replacement)
    assert not passes(PRIMARY[name])


# What no vector covers: float32, prefill, and one call against another.


def causal(mode: int, **tokens: int) -> dict[str, Any]:
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    return {"atten_mask": mask, "sparse_mode": mode, **tokens}


def visible(queries: int, keys: int, before: int | None, after: int | None) -> Tensor:
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    return (distance >= -(keys if before is None else before)) & (
        distance <= (keys if after is None else after)
    )


@pytest.mark.parametrize(
    ("keywords", "before", "after"),
    [
        ({"sparse_mode": 0}, None, None),
        (causal(3), None, 0),
        (causal(4, pre_tokens=7, next_tokens=0), 7, 0),
        (causal(4, pre_tokens=5, next_tokens=3), 5, 3),
    ],
)
def test_prefill_is_attention(keywords: Any, before: int | None, after: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    queries, keys = [300, 1, 17], [300, 9, 40]
    q = torch.randn(sum(queries), 4, 16, generator=random)
    k, v = (torch.randn(sum(keys), 2, 16, generator=random) for _ in range(2))
    ends = [list(torch.tensor(lengths).cumsum(0).tolist()) for lengths in (queries, keys)]
    heads = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.25, "input_layout": "TND"}
    lengths = {"actual_seq_lengths": ends[0], "actual_seq_lengths_kv": ends[1]}
    out, _ = npu.npu_fused_infer_attention_score(q, k, v, **heads, **lengths, **keywords)
    for at, a, b, c in zip(range(3), q.split(queries), k.split(keys), v.split(keys), strict=True):
        expected = scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (a, b, c)),
            attn_mask=visible(queries[at], keys[at], before, after),
            scale=0.25,
            enable_gqa=True,
        )
        torch.testing.assert_close(out.split(queries)[at], expected.transpose(0, 1))


def test_paged_codes_are_contiguous_floats() -> None:
    random = torch.Generator().manual_seed(0)
    codes = [
        torch.randint(-128, 128, (5, 32, 2, 16), generator=random).to(torch.int8) for _ in range(2)
    ]
    scale, offset = (torch.rand(2, 2, 16, generator=random) for _ in range(2))
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    floats = [
        (cache[table.long()].flatten(1, 2) + offset[i]) * scale[i] for i, cache in enumerate(codes)
    ]
    q = torch.randn(2, 1, 4, 16, generator=random)
    heads = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.25}
    heads["actual_seq_lengths_kv"] = [33, 64]  # type: ignore[assignment]
    expected, _ = npu.npu_fused_infer_attention_score(q, *floats, **heads, input_layout="BSND")
    paged = {"block_table": table, "block_size": 32, **heads}
    together = {"antiquant_scale": scale, "antiquant_offset": offset}
    apart = {
        f"{which}_antiquant_{name}": parameter[i].flatten()
        for i, which in enumerate(("key", "value"))
        for name, parameter in (("scale", scale), ("offset", offset))
    }
    bsh = [cache.flatten(2) for cache in codes]
    bnsd = [cache.transpose(1, 2).contiguous() for cache in codes]
    for layout, query, caches, parameters in (
        ("BSND", q, bsh, together),
        ("BSH", q.flatten(2), bsh, {name: x.flatten(1) for name, x in together.items()}),
        ("BSH", q.flatten(2), bsh, apart),
        ("BNSD", q.transpose(1, 2), bnsd, apart),
    ):
        out, lse = npu.npu_fused_infer_attention_score(
            query, *caches, **paged, **parameters, input_layout=layout
        )
        assert torch.equal(out.flatten(), expected.flatten())
        assert lse.shape == (0,)


def test_pages_in_nz_are_pages() -> None:
    """What npu_scatter_pa_kv_cache writes in format NZ, attention reads as it reads ND."""
    random = torch.Generator().manual_seed(0)
    slots = torch.randperm(3 * 128, generator=random)[:200].to(torch.int32)
    k, v = (
        torch.randint(-128, 128, (200, 8, 128), generator=random).to(torch.int8) for _ in range(2)
    )
    flat = [torch.zeros(3, 128, 8, 128, dtype=torch.int8) for _ in range(2)]
    nz = [torch.zeros(3, 8 * 4, 128, 32, dtype=torch.int8) for _ in range(2)]
    npu.npu_scatter_pa_kv_cache(k, v, *flat, slots, cache_mode="Norm")
    npu.npu_scatter_pa_kv_cache(k, v, *nz, slots, cache_mode="PA_NZ")
    scales = {
        f"{which}_antiquant_scale": torch.rand(8 * 128, generator=random).bfloat16()
        for which in ("key", "value")
    }
    heads = {"num_heads": 64, "num_key_value_heads": 8, "scale": 0.1, "inner_precise": 1}
    table = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    paged = {"block_table": table, "block_size": 128, "actual_seq_lengths_kv": [130, 256]}
    q = torch.randn(2, 1, 64 * 128, generator=random).bfloat16()
    outs = [
        npu.npu_fused_infer_attention_score(q, *caches, **scales, **heads, **paged)[0]
        for caches in (
            [cache.flatten(2) for cache in flat],
            [cache.view(3, 8, 4, 128, 32) for cache in nz],
        )
    ]
    assert outs[0].abs().max() > 1
    assert torch.equal(*outs)


def test_float_pages_are_contiguous_floats() -> None:
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 16, 2, 16, generator=random) for _ in range(2))
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    q = torch.randn(3, 4, 16, generator=random)
    heads = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.25}
    tnd = {"input_layout": "TND", "actual_seq_lengths": [3], **heads, **causal(3)}
    expected, _ = npu.npu_fused_infer_attention_score(
        q, *(x[[2, 0]].flatten(0, 1)[:19] for x in (k, v)), **tnd, actual_seq_lengths_kv=[19]
    )
    paged = {"block_table": table, "block_size": 16, "actual_seq_lengths_kv": [19]}
    out, _ = npu.npu_fused_infer_attention_score(q, k.flatten(2), v.flatten(2), **tnd, **paged)
    assert torch.equal(out, expected)
    last = torch.empty(1, 4, 16)
    lens = torch.tensor([19], dtype=torch.int32)
    npu.atb_paged_attention(q[2:], k, v, 2, 4, 0.25, table, lens, last)
    torch.testing.assert_close(last, expected[2:])


def test_float32_matmul_is_the_formula() -> None:
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, (6, 40), generator=random).to(torch.int8) for _ in range(2))
    scale = torch.rand(6, generator=random)
    bias = torch.randint(-(2**20), 2**20, (6,), generator=random).to(torch.int32)
    sums = (x.long() @ w.long().T + bias).to(torch.int32)
    call = {"bias": bias, "output_dtype": torch.float32}
    out = npu.npu_quant_matmul(x.view(2, 3, 40), w.T, scale, **call)
    assert torch.equal(out, (sums.to(torch.float32) * scale).view(2, 3, 6))
    cut = (scale.view(torch.int32) & -8192).view(torch.float32)
    packed = npu.npu_trans_quant_param(scale)
    full_bits = scale.view(torch.int32).long()  # neither cut nor marked: read as FP19 all the same
    for given in (scale, packed, full_bits):
        out = npu.npu_quant_matmul(x, w.T, given, bias=bias, output_dtype=torch.float16)
        assert torch.equal(out, (sums.to(torch.float32) * cut).half())


def test_float32_quantize_is_the_formula() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(9, 32, generator=random) * 4
    scale = torch.rand(32, generator=random) / 10 + 0.01
    zero = torch.randint(-20, 20, (32,), generator=random).to(torch.int32)
    expected = (x / scale + zero).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(npu.npu_quantize(x, scale, zero, torch.qint8, -1), expected)
    back = npu.npu_anti_quant(expected, scale, offset=-zero.float(), dst_dtype=torch.float32)
    assert torch.equal(back, (expected.float() - zero) * scale)


def test_functional_scatter_leaves_its_arguments() -> None:
    rows = torch.arange(1, 25, dtype=torch.int8).view(3, 2, 4)
    caches = [torch.zeros(2, 4, 2, 4, dtype=torch.int8) for _ in range(2)]
    slots = torch.tensor([6, -1, 0], dtype=torch.int32)
    outs = npu.npu_scatter_pa_kv_cache_functional(rows, rows, *caches, slots, cache_mode="Norm")
    assert not any(cache.any() for cache in caches)
    npu.npu_scatter_pa_kv_cache(rows, rows, *caches, slots, cache_mode="Norm")
    flat = torch.zeros(8, 2, 4, dtype=torch.int8)
    npu.npu_scatter_nd_update_(flat, slots[[0, 2]].view(2, 1), rows[[0, 2]])
    assert int(flat.count_nonzero()) == 16
    for cache in (*outs, *caches):
        assert torch.equal(cache.flatten(0, 1), flat)


@pytest.mark.parametrize("offset", [None, torch.arange(-32.0, 32).half()])
@pytest.mark.parametrize("seen", ["all", "window", "mask"])
def test_codes_are_attended_to_part_by_part_as_floats_all_at_once(monkeypatch, offset, seen):
    """Logits are small multiples of 2**-10, a channel of V has one row: every sum is exact."""
    random, length = torch.Generator().manual_seed(0), 2500
    query = torch.randint(-4, 5, (1, 4, 32), generator=random).half()
    key = torch.randint(-128, 128, (length, 2, 32), generator=random, dtype=torch.int8)
    value = torch.zeros_like(key)
    value.scatter_(0, torch.randint(900, length, (1, 2, 32), generator=random), 99)
    scale = torch.full((64,), 2.0**-7).half()
    mask = torch.rand(length, generator=random) < 0.5
    window = {
        "all": scaled_attention.Window(),
        "window": scaled_attention.Window(before=1500),
        "mask": scaled_attention.Mask(mask),
    }[seen]
    codes = scaled_attention.Codes(key, scale, offset), scaled_attention.Codes(value, scale)
    floats = DEQUANTIZE(key, scale, offset), DEQUANTIZE(value, scale, None)
    monkeypatch.setattr(scaled_attention, "_FLOATS", 64 * 1000)  # so in three parts
    for last in (True, False):
        got = scaled_attention.attend_codes(query, *codes, 0.125, window, divide_last=last)
        want = scaled_attention.attend(query, *floats, 0.125, window, divide_last=last)
        assert got[0].any()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
