"""Emulated NPU ops give what the vendor's golden functions give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvc8.backends.npu.emulation import attention, matmul, quantization, scaled_attention
from kvc8.ir import npu

VECTORS = Path(__file__).parent / "golden" / "npu_ops"
CASES = {case["id"]: case for case in json.loads((VECTORS / "index.json").read_text())["cases"]}
PRIMARY = {name: case for name, case in CASES.items() if case["variant"] != "contradicts"}

# The one golden that its kernel contradicts: it multiplies by the scale and clamps at 10.
CONTRADICTED = {"npu_rope_quant_kvcache__VARIANT_opplugin_multiply_clamp0_10"}

# Integer outputs are held to be exact, whatever the tolerance of the index, but where the kernel
# rounds to half precision before it rounds to an integer and the golden does not.
ROUNDS_TWICE = ("_npu_quantize_per_tensor", "npu_rms_norm_quant", "atb_pre_rms_norm_quant")
# Held to the vendor's own tolerance only: with a float16 result npu_quant_matmul cuts its scale to
# 19 bits, up to 1/1024 below what this golden multiplies by, and the tolerance is 2/1000.
CUTS_ITS_SCALE = ("atb_linear",)


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """An argument as index.json writes it."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict) and "$dtype" in value:
        return getattr(torch, value["$dtype"].removeprefix("torch."))
    return value


def load(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stored = load_file(VECTORS / case["file"])
    inputs = {name[3:]: tensor for name, tensor in stored.items() if name.startswith("in.")}
    return inputs, {name[4:]: tensor for name, tensor in stored.items() if name.startswith("out.")}


def run(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call the op of a case and name its outputs."""
    args = [decode(arg, tensors) for arg in case["args"]]
    kwargs = {name: decode(arg, tensors) for name, arg in case["kwargs"].items()}
    if case["fn"] in ATB_OPERATIONS:
        returned = ATB_OPERATIONS[case["fn"]](tensors, **kwargs)
    else:
        kwargs.pop("_nz", None)  # a mark for emulations that do not look at the caches' shapes
        namespace = torch.ops.atb if case["fn"].startswith("_") else torch.ops.npu
        returned = getattr(namespace, case["fn"])(*args, **kwargs)
    if isinstance(returned, Tensor):
        returned = (returned,)
    return {
        out["name"]: tensors[out["input"]] if out["from"] == "mutated" else returned[out["index"]]
        for out in case["outputs"]
    }


# ATB operations that torch has no overload for, or one that gives them other arguments: each is
# computed by the op that kvc8 offers in its place.


def atb_paged_attention(given: dict[str, Tensor], **param: Any) -> Tensor:
    """PagedAttentionOperation without offsets, as the torch op that builds it."""
    query, table, lens = given["query"], given["block_table"], given["context_lens"]
    acl = {torch.float16: 1, torch.bfloat16: 27}[query.dtype]
    out = torch.empty_like(query)
    sizes = param["kvHeadNum"], param["headNum"], param["qkScale"]
    caches = given["key_cache"], given["value_cache"]
    descales = given["k_descale"], given["v_descale"]
    npu.atb_paged_attention_quant(query, *caches, *sizes, table, lens, 1, acl, *descales, out)
    return out


def atb_linear(given: dict[str, Tensor], **param: Any) -> Tensor:
    """LinearOperation on int8: (x·w + bias)*deqScale."""
    weight = given["weight"].T if param["transposeB"] else given["weight"]
    bias = given["bias"].flatten() if param["hasBias"] else None
    dtype = {"ACL_FLOAT16": torch.float16, "ACL_BF16": torch.bfloat16}[param["outDataType"]]
    call = {"bias": bias, "output_dtype": dtype}
    return npu.npu_quant_matmul(given["x"], weight, given["deqScale"], **call)


def atb_rope(given: dict[str, Tensor], **param: Any) -> tuple[Tensor, ...]:
    """RopeOperation with rotaryCoeff 2, rotation by halves."""
    assert param == {"rotaryCoeff": 2}
    cos, sin = given["cos"][:, None], given["sin"][:, None]
    heads = (given[name].unflatten(1, (-1, cos.shape[-1])) for name in ("q", "k"))
    return tuple(npu.npu_rotary_mul(x, cos, sin).flatten(1) for x in heads)


def atb_dequant(given: dict[str, Tensor]) -> Tensor:
    """Elewise dequantization; its offset is the zero point and not minus it."""
    offset = -given["offset"].float()
    return npu.npu_anti_quant(given["x"], given["scale"].float(), offset=offset, dst_dtype=5)


def atb_pre_rms_norm_quant(given: dict[str, Tensor], **param: Any) -> tuple[Tensor, ...]:
    """RmsNormOperation, PRE_NORM and quantizing: codes of the norm of x + resIn, and the sum."""
    gamma, beta, scale, offset = (given[name] for name in ("gamma", "beta", "scale", "offset"))
    *_, total = npu.npu_add_rms_norm(given["x"], given["resIn"], gamma[0], param["epsilon"])
    codes = npu.npu_rms_norm_quant(total, gamma, beta, scale, offset, param["epsilon"])
    return codes, total


ATB_OPERATIONS: dict[str, Callable[..., Any]] = {
    "atb_paged_attention": atb_paged_attention,
    "atb_linear": atb_linear,
    "atb_rope": atb_rope,
    "atb_elewise_dequant_per_channel": atb_dequant,
    "atb_pre_rms_norm_quant": atb_pre_rms_norm_quant,
}


def accepts(got: Tensor, expected: Tensor, tol: dict[str, Any], *, exact: bool) -> bool:
    """Whether got is expected within a tolerance of index.json."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    a, b = got.double(), expected.double()
    if exact or tol["kind"] == "exact" or tol.get("tight_ulp") == 0:
        return torch.equal(a, b)
    error = (a - b).abs()
    error[(a == b) | (a.isnan() & b.isnan())] = 0  # infinities that agree
    match tol["kind"]:
        case "abs":
            return bool((error <= tol["atol"]).all())
        case "allclose":
            return bool((error <= tol["atol"] + tol["rtol"] * b.abs()).all())
        case "rel_max1":
            return bool((error <= tol["err"] * b.abs().clamp(min=1)).all())
        case "rtol_equal":  # a fraction of the values may miss it, in torch_npu's own tests
            bound = tol["prec"] * torch.maximum(a.abs(), b.abs()).clamp(min=1)
            allowed = 0 if expected.dtype == torch.bfloat16 else int(tol["prec"] * error.numel())
            return int((~(error <= bound)).sum()) <= allowed
    raise AssertionError(f"{tol['kind']} is not a tolerance that is known")


def without_tight(tol: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tol.items() if name != "tight_ulp"}


def passes(case: dict[str, Any]) -> bool:
    inputs, expected = load(case)
    got = run(case, inputs)
    return all(
        accepts(
            got[out["name"]],
            expected[out["name"]],
            without_tight(out["tol"]) if case["fn"] in CUTS_ITS_SCALE else out["tol"],
            exact=not expected[out["name"]].is_floating_point() and case["fn"] not in ROUNDS_TWICE,
        )
        for out in case["outputs"]
    )


@pytest.mark.parametrize("name", sorted(PRIMARY))
def test_vector(name: str) -> None:
    assert passes(PRIMARY[name])


def test_nothing_is_left_out_but_what_its_kernel_contradicts() -> None:
    ops = {schema.partition("(")[0].split("::")[1] for schema in npu.SCHEMAS}
    assert {case["fn"] for case in PRIMARY.values()} <= ops | set(ATB_OPERATIONS)
    assert set(CASES) - set(PRIMARY) == CONTRADICTED
    assert len(PRIMARY) == 89


MUTANTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "offset sign in attention": (
        attention,
        "dequantize",
        lambda codes, scale, offset: scaled_attention.dequantize(
            codes, scale, None if offset is None else -offset
        ),
        "npu_fused_infer_attention_score__paged_bf16_asym_bs128_d128",
    ),
    "heads interleaved": (
        attention,
        "attend",
        lambda q, k, v, *args, **kwargs: scaled_attention.attend(
            q, k.flip(1), v.flip(1), *args, **kwargs
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
