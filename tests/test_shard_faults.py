"""Contracts of divided programs: sound passes keep them, and planted faults are found and named."""

from pathlib import Path

import pytest
import torch
from support import c8, planted

from kvc8.ir import rank_ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, argument, expression_of
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.rewrite import name_of
from kvc8.tools.verifier.check_passes import check_passes
from kvc8.tools.verifier.contracts import RecordedCall, check
from kvc8.tools.verifier.recording import Parameters, feed
from kvc8.tools.verifier.verdicts import Verdict

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "qwen2_fp16_none_asym" / "quant"
NZ_SIZES = {
    **{"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 10, "num_key_value_heads": 1, "head_dim": 128},
}
PROMPT = feed([5, 9, 17, 33, 65, 12, 101])


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(open_checkpoint(GOLDEN), torch.float32)


def faulty(captured: Program, fault: planted.Fault, sums: str) -> Verdict:
    """What the check of a division by two says, in which a fault was planted."""
    options = Options(ranks=2, sums=sums)  # type: ignore[arg-type]
    program, parameters = captured.copy(), Parameters(open_checkpoint(GOLDEN).read)
    pipeline.run(program, pipeline.QUANTIZE)
    *_, shard = pipeline.quantize_passes(options)
    step = planted.plant(shard, fault)
    return check(program, [step], [RecordedCall(PROMPT)], parameters, ranks=2)[-1]


def dropped_sum(program: Program) -> None:
    total = planted.here(program, rank_ops.all_reduce, within="mlp")[0]
    total.replace_all_uses_with(argument(total, 0))


def bias_of_every_rank(program: Program) -> None:
    for node in program.parameters():
        if "layers_1_self_attn_o" in node.name and expression_of(node).op == "first":
            node.meta["expression"] = expression_of(node).args[0]


def scale_of_another_rank(program: Program) -> None:
    [node] = [node for node in program.parameters() if node.name == "k_scale_1"]
    x, dim, size = expression_of(node).args
    assert isinstance(size, int)
    node.meta["expression"] = Expression("slice", (x, dim, 0, size))  # the first rank's, on all


def swapped_kv_heads(program: Program) -> None:
    names = [n for n in program.parameters() if n.name.endswith("layers_1_self_attn_v_proj_int8")]
    [node] = names
    x, dim, size = expression_of(node).args
    assert isinstance(size, int)
    halves = (Expression("slice", (x, 0, size, 2 * size)), Expression("slice", (x, 0, 0, size)))
    turned = Expression("concat", (halves, 0))
    node.meta["expression"] = Expression("shard", (turned, dim, size))


@pytest.mark.parametrize(
    ("fault", "sums", "said"),
    [
        (dropped_sum, "int32", "is another on each rank, and linear_"),
        (bias_of_every_rank, "half", "all_reduce_2 differs from"),
        (scale_of_another_rank, "int32", "_rank1 differs from"),
        (swapped_kv_heads, "int32", "_rank0 differs from"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_planted_fault_is_found_in_its_layer(captured, fault, sums, said):
    verdict = faulty(captured, fault, sums)
    assert verdict.name == "shard"
    assert said in verdict.sentence
    where = "layer 1: " if verdict.refused else "breaks its contract real_exact in layer 1, prefill"
    assert where in verdict.sentence
    assert {site.layer for site in verdict.breaches} <= {"layer 1"}


# kind, which linears are W8A8, dtype, options: together all passes have something to do.
DIVIDED = [
    ("qwen3", "all", torch.bfloat16, Options(ranks=2, kv_format="nz")),
    ("qwen3", "all", torch.float16, Options(ranks=2, prefill_kv="int8", fold="kv")),
    ("qwen2", "w8a8", torch.float16, Options(ranks=2, sums="half")),
    ("qwen2", "float", torch.float16, Options(ranks=2)),
]
OF_MIXTURES = {"lower_dynamic_linear", "lower_router", "lower_mixture"}  # tests/test_mixtures.py
OF_GELU = {
    "lower_geglu"
}  # of one rank's columns as lower_swiglu; its contract: tests/test_fusion_contracts.py
OF_LATENTS = {"lower_latent_attention"}  # which no rank divides; tests/test_latent_npu.py


def test_every_pass_downstream_keeps_its_contract_on_divided_programs(tiny_model, tmp_path):
    """With zero points to both ends of int8, and heads that NZ pages may have."""
    asked, judged = set[str](), set[str]()
    for i, (kind, linears, dtype, options) in enumerate(DIVIDED):
        c8.quantize_model(tiny_model(kind, **NZ_SIZES), tmp_path / f"{i}", linears)
        checkpoint = open_checkpoint(c8.with_offsets(tmp_path / f"{i}", tmp_path / f"{i}-zeros"))
        verdicts = check_passes(checkpoint, capture(checkpoint, dtype), options)
        assert [verdict.sentence for verdict in verdicts if verdict.sentence] == []
        judged |= {verdict.name for verdict in verdicts if verdict.sites}
        shared_and_own = pipeline.phases(options).values()
        asked |= {name_of(step) for parts in shared_and_own for part in parts for step in part}
    assert asked - judged == OF_MIXTURES | OF_GELU | OF_LATENTS
