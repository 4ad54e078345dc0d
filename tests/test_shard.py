"""Tensor parallelism: a divided model gives what the whole one gives, code by code."""

import functools
import math
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from support import fused_models, ranks
from support.onnx_models import BOUND, DOUBLE_BOUND, QUANTIZED, captured, quantized

from kvc8.ir import mixture_ops, ops, rank_ops
from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.expression import Expression, make, stored
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program, argument, expression_of, tensor_type
from kvc8.ir.ranks import bound, of_rank, side_by_side
from kvc8.ir.text import parse, show
from kvc8.ir.verify import verify
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.shard import shard

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
SIX = {
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 2},
    **{"hidden_size": 96, "vocab_size": 129},  # 129 words have 3 parts
}
NINE = {**SIX, "num_attention_heads": 9, "hidden_size": 144, "intermediate_size": 144}  # SmolLM2's
SMALL = """
    def quantized(
        x: f16[1, T, 8],
        w: i8[4, 8] = shard(stored("w"), 1, 8),
        d: f32[4] = stored("d"),
        b: i32[4] = stored("b"),
        s: f32[1] = stored("s"),
    ):
        quantize: i8[1, T, 8] = kvc8.quantize(x, s, None)
        int_linear: i32[1, T, 4] = kvc8.int_linear(quantize, w)  # w
        all_reduce: i32[1, T, 4] = kvc8.all_reduce(int_linear, 3)  # w
        dequant_sum: f16[1, T, 4] = kvc8.dequant_sum(all_reduce, d, b, f16)  # w
        return [dequant_sum]
"""
SIDE_BY_SIDE = """
    def quantized(
        x: f16[1, T, 8],
        w_rank0: i8[4, 8] = slice(stored("w"), 1, 0, 8),
        w_rank1: i8[4, 8] = slice(stored("w"), 1, 8, 16),
        w_rank2: i8[4, 8] = slice(stored("w"), 1, 16, 24),
        d: f32[4] = stored("d"),
        b: i32[4] = stored("b"),
        s: f32[1] = stored("s"),
    ):
        quantize: i8[1, T, 8] = kvc8.quantize(x, s, None)
        int_linear_rank0: i32[1, T, 4] = kvc8.int_linear(quantize, w_rank0)  # w
        int_linear_rank1: i32[1, T, 4] = kvc8.int_linear(quantize, w_rank1)  # w
        int_linear_rank2: i32[1, T, 4] = kvc8.int_linear(quantize, w_rank2)  # w
        all_reduce_to_rank1: i32[1, T, 4] = aten.add.Tensor(int_linear_rank0, int_linear_rank1)  # w
        all_reduce: i32[1, T, 4] = aten.add.Tensor(all_reduce_to_rank1, int_linear_rank2)  # w
        dequant_sum: f16[1, T, 4] = kvc8.dequant_sum(all_reduce, d, b, f16)  # w
        return [dequant_sum]
"""


@functools.cache
def whole(directory: Path) -> tuple[Program, list[torch.Tensor], dict[str, torch.Tensor]]:
    """A W8A8 model with zero points, QUANTIZED, and what it gives in double precision."""
    program = fused_models.quantized(directory, torch.float16, w8a8=True, zeros=True)
    return program, *ranks.session(widen(program), directory)


def divided(program: Program, count: int, sums: str = "int32") -> Program:
    made = program.copy()
    shard(made, ranks=count, sums=sums)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "counts"),
    [
        *((kind, EIGHT, (2, 4, 8)) for kind in ("llama", "qwen2", "qwen3", "mistral")),
        *((kind, SIX, (3,)) for kind in ("qwen2", "qwen3", "mistral")),
        ("llama", NINE, (3,)),
    ],
)
def test_no_code_differs_in_double_precision(tiny_model, kind, config, counts):
    """KV heads divided, one a rank, and shared by neighbors; every kind of batch."""
    directory = tiny_model(kind, **config)
    program, logits, caches = whole(directory)
    for count in counts:
        made = side_by_side(widen(divided(program, count)), count)
        got, codes = ranks.session(made, directory)
        assert ranks.differing(codes, caches) == 0
        for a, b in zip(got, logits, strict=True):
            assert (a - b).abs().max() <= DOUBLE_BOUND * b.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float16, 2), (torch.float16, 8), (torch.bfloat16, 2)]
)
def test_int32_sums_give_the_bits_of_one_device(tiny_model, dtype, count):
    """So it is no worse against double precision; 127 words leave lm_head whole."""
    directory = tiny_model("llama", **EIGHT, vocab_size=127, head_dim=32)
    program = fused_models.quantized(directory, dtype, w8a8=True, zeros=True)
    made = program.copy()
    [left] = [remark for remark in shard(made, ranks=count) if remark.why_not]
    assert left.why_not == f"the width of {left.node}, of 127 does not divide by {count}"
    assert_same_bits(program, side_by_side(made, count), directory)
    many = {phase: side_by_side(x, count) for phase, x in fused_models.lowered(made, "on").items()}
    assert_same_bits(fused_models.lowered(program, "on"), many, directory)


def assert_same_bits(program: ranks.Programs, of_ranks: ranks.Programs, directory: Path) -> None:
    logits, caches = ranks.session(program, directory)
    got, codes = ranks.session(of_ranks, directory)
    assert ranks.differing(codes, caches) == 0
    for a, b in zip(got, logits, strict=True):
        assert torch.equal(a, b)


EXPERTS = ("gpt_oss", "granitemoe", "qwen3_moe", "glm4_moe")


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_divided_by_their_inner_width(tiny_model, kind):
    """Gate and up apart, in one weight, and taking turns in it; biases once; shared experts."""
    directory = tiny_model(kind, num_hidden_layers=2)
    options = {"w8a8": False, "zeros": True}
    program = fused_models.quantized(directory, torch.float16, **options)
    made = divided(program, 2)
    grouped = mixture_ops.grouped_linear
    for a, b in zip(program.calls(grouped), made.calls(grouped), strict=True):
        whole_size, size = (tensor_type(argument(n, 1)).shape for n in (a, b))
        assert 2 * math.prod(size) == math.prod(whole_size)
    assert show(parse(show(made))) == show(made)
    logits, caches = ranks.session(widen(program), directory)
    got, codes = ranks.session(side_by_side(widen(made), 2), directory)
    assert ranks.differing(codes, caches) == 0
    for a, b in zip(got, logits, strict=True):
        assert (a - b).abs().max() <= DOUBLE_BOUND * b.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("sums", ["int32", "half"])
def test_float_linears_and_sums_in_half_are_equal_in_real_numbers(tiny_model, sums):
    """With sums in int32, down_proj is float; codes of a share lie far from middles here."""
    directory = tiny_model("qwen2", **EIGHT)
    keep = ("down_proj",) if sums == "int32" else ()
    options = {"w8a8": True, "zeros": True, "keep_float": keep}
    program = fused_models.quantized(directory, torch.float16, **options)
    logits, caches = ranks.session(widen(program), directory)
    got, codes = ranks.session(side_by_side(widen(divided(program, 4, sums)), 4), directory)
    assert ranks.differing(codes, caches) == 0
    most = DOUBLE_BOUND if sums == "int32" else BOUND  # shares are scaled in float32 each
    for a, b in zip(got, logits, strict=True):
        assert (a - b).abs().max() <= most * b.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("directory", "options"),
    [(QUANTIZED[0], {"fold": "kv", "prefill_kv": "int8"}), (QUANTIZED[1], {})],
    ids=["symmetric, folded", "with zero points and biases"],
)
def test_lowered_w8a8_is_the_same_bit_for_bit_in_float32(directory, options):
    """Int32 sums are exact, heads are independent, and no float linear but lm_head is divided."""
    program, options = quantized(directory), Options(**options)
    one, _ = pipeline.lower_for_npu(program, options)
    many, _ = pipeline.lower_for_npu(divided(program, 2), options)
    for phase in many.values():
        assert show(parse(show(phase))) == show(phase)
    logits, caches = ranks.session(one, directory)
    got, codes = ranks.session({p: side_by_side(x, 2) for p, x in many.items()}, directory)
    assert ranks.differing(codes, caches) == 0
    for a, b in zip(got, logits, strict=True):
        assert (a - b).abs().max() <= BOUND * b.abs().max()


def test_an_output_of_all_ranks_is_that_of_the_whole():
    random = torch.Generator().manual_seed(0)
    x, w = (
        torch.randint(-128, 128, s, generator=random, dtype=torch.int8) for s in ((20, 24), (4, 24))
    )
    scale, bias = torch.rand(4, generator=random), torch.randint(-99, 99, (4,), dtype=torch.int32)
    sums = [rank_ops.int_linear(x[:, i : i + 8], w[:, i : i + 8]) for i in (0, 8, 16)]
    want = ops.quant_linear(x, w, scale, bias, torch.float16)
    assert torch.equal(rank_ops.dequant_sum(sum(sums), scale, bias, torch.float16), want)
    whole_sum = rank_ops.int_linear(x, w, bias)
    assert torch.equal(rank_ops.dequant_sum(whole_sum, scale, None, torch.float16), want)


def test_all_ranks_side_by_side_as_text():
    program = parse(SMALL)
    verify(program)
    made = side_by_side(program, 3)
    verify(made)
    assert show(made) == dedent(SIDE_BY_SIDE).strip()


def test_a_rank_is_bound_in_every_place():
    both = Expression("concat", ((Expression("shard", (stored("a"), 0, 4)), stored("b")), 0))
    part = Expression("concat", ((Expression("slice", (stored("a"), 0, 8, 12)), stored("b")), 0))
    assert bound(both, 2) == part
    shared = Expression("shard", (stored("k"), 0, 4, 2))
    assert [bound(shared, rank).args[2] for rank in range(4)] == [0, 0, 4, 4]
    first = Expression("first", (stored("b"),))
    assert bound(first, 0) == stored("b")
    made = make(bound(first, 1), lambda name: torch.tensor([3.0, 4.0]))
    assert torch.equal(made, torch.zeros(2))
    program = of_rank(parse(SMALL), 1)
    assert str(expression_of(program.parameters()[0])) == 'slice(stored("w"), 1, 8, 16)'


REFUSED = [
    (
        SMALL.replace("kvc8.all_reduce(int_linear, 3)", "aten.neg(int_linear)"),
        "int_linear: is another on each rank, and output takes it for what all have; "
        "put a collective between them",
    ),
    (
        SMALL.replace("def quantized", "def captured"),
        "int_linear: kvc8.int_linear.default has no place in a captured program; "
        "run the pass that replaces it",
    ),
    (
        SMALL.replace("kvc8.all_reduce(int_linear, 3)", "_c10d_functional.wait_tensor(int_linear)"),
        "all_reduce: _c10d_functional.wait_tensor.default has no place in a quantized program; "
        "run the pass that replaces it",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=["dropped", "stage", "lowered op"])
def test_verify_refuses(text, sentence):
    with pytest.raises(IRError) as refused:
        verify(parse(text))
    assert str(refused.value) == sentence


def test_one_rank_cannot_make_what_differs_between_ranks():
    with pytest.raises(IRError) as refused:
        make(Expression("shard", (stored("a"), 0, 4)), lambda name: torch.zeros(8))
    assert str(refused.value) == "shard: is another on each rank; bind one, with of_rank"
    with pytest.raises(RuntimeError) as alone:
        rank_ops.all_reduce(torch.zeros(1), 2)
    assert str(alone.value) == (
        "kvc8.all_reduce: one rank has no value of what all do together; "
        "run the program of side_by_side, or lower it"
    )


@pytest.mark.slow
def test_ranks_that_divide_no_attention_are_refused_with_those_that_do(tiny_model):
    program = captured(QUANTIZED[0])
    pipeline.run(program, pipeline.QUANTIZE)
    with pytest.raises(TargetError) as refused:
        shard(program, ranks=3)
    assert str(refused.value) == (
        "shard: 8 heads over 2 KV heads do not divide among 3 ranks; use one of 2, 4, 8"
    )
    with pytest.raises(TargetError) as none:
        Options(ranks=0)
    assert str(none.value) == "ranks: is 0 and should be from 1 to 1024; correct it"
