"""Models with experts: captured, quantized, and lowered to an NPU and to ONNX."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.replayed import PHASES, replayed
from support.steps import step, values
from transformers import AutoModelForCausalLM

from kvc8.backends.npu import legality
from kvc8.ir import mixture_ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.run import run
from kvc8.ir.text import parse, show
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools import command, quantize
from kvc8.tools.quantizer.sites import sites
from kvc8.tools.verifier.check_passes import check_passes
from kvc8.tools.verifier.form_table import double_rows
from kvc8.tools.verifier.forms import Tokens
from kvc8.tools.verifier.recording import Parameters

slow = pytest.mark.slow
TEXT = "12"  # so few tokens that they cannot reach 12 experts, of which each takes 3
TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11, 7, 101, 2, 33]
# Names of their own on disk (experts apart, packed, renamed), and each kind of router.
KINDS = ("qwen3_moe", "glm4_moe", "minimax_m2", "granitemoe", "gpt_oss")
QUANTIZED = ("qwen3_moe", "glm4_moe")


def logits(directory: Path) -> torch.Tensor:
    program = capture(open_checkpoint(directory), torch.float32)
    given = step(TOKENS, [0], [len(TOKENS)], [[0, 1, 2, 3]])
    return run(program, {**values(program, directory), **given})[0]


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_computes_what_transformers_computes(tiny_model, kind):
    model = tiny_model(kind, num_hidden_layers=2)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        want = net(torch.tensor([TOKENS])).logits[0]
    # Sums of 64 float32 products in another order, through two layers of values near one.
    assert torch.allclose(logits(model), want, rtol=1e-4, atol=1e-4)


@slow
def test_its_text_reads_back(tiny_model):
    program = capture(open_checkpoint(tiny_model("qwen3_moe")))
    assert len(program.calls(mixture_ops.grouped_linear)) == 4 * 2
    assert show(parse(show(program))) == show(program)


def test_rows_go_to_their_experts_and_come_back_weighted():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8).double(), torch.randn(4, 6, 8).double()
    experts = torch.tensor([[2, 0], [3, 2], [0, 2], [2, 3], [0, 3]])  # none to expert 1
    weights = torch.rand(5, 2).double()
    rows, places, counts = mixture_ops.route(x, experts, 4)
    assert counts.tolist() == [3, 0, 4, 3]
    out = mixture_ops.combine(
        mixture_ops.grouped_linear(rows, weight, None, counts), places, weights
    )
    want = torch.einsum("tk,tkoi,ti->to", weights, weight[experts], x)
    # Two sums of eight products of values near one, in another order.
    assert torch.allclose(out, want, rtol=0, atol=1e-13)


def test_experts_in_int8_are_each_row_by_its_own():
    torch.manual_seed(0)
    x = torch.randint(-128, 128, (6, 40), dtype=torch.int8)
    weight = torch.randint(-127, 128, (3, 5, 40), dtype=torch.int8)
    scale, rows, counts = torch.rand(3, 5), torch.rand(6), torch.tensor([1, 0, 5])
    got = mixture_ops.dynamic_grouped_linear(x, rows, weight, scale, counts, torch.float32)
    for row, expert in enumerate([0, 2, 2, 2, 2, 2]):
        sums = (x[row].long() * weight[expert].long()).sum(1)
        assert torch.equal(got[row], sums.float() * scale[expert] * rows[row])


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory) -> Callable[[str], Path]:
    """A kind's model with experts in W8A8_DYNAMIC, attention in W8A8 and C8."""

    @functools.cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        path = folder / "texts.jsonl"
        path.write_text(json.dumps({"text": TEXT}) + "\n")
        model = tiny_model(kind, num_hidden_layers=2, head_dim=32)
        given = [str(model), "-o", str(folder / "out"), "--calib-file", str(path)]
        assert command.entry(quantize.parser(), quantize.work, given) == 0
        return folder / "out"

    return made


@slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_each_linear_is_labeled_and_each_tensor_accounted_for(quantized, kind):
    found = open_checkpoint(quantized(kind))
    labels = json.loads((found.path / "quant_model_description.json").read_text())
    assert (labels["model_quant_type"], labels["kv_cache_type"]) == ("W8A8", "C8")
    assert found.warnings == ()
    dense = [name for name, linear in found.w8a8.items() if linear.activations == "static"]
    experts = [name for name, linear in found.w8a8.items() if linear.activations == "dynamic"]
    assert all(".experts." not in name for name in dense)
    mixtures = 2 if kind == "qwen3_moe" else 1  # GLM's first layer is dense
    count = {"qwen3_moe": 4, "glm4_moe": 12}[kind]
    assert len(experts) == mixtures * count * 3
    assert all(".mlp.experts." in name for name in experts)
    routers = [name for name in labels if name.endswith("mlp.gate.weight")]
    assert [labels[name] for name in routers] == ["FLOAT"] * mixtures
    capture(found)  # warns of a tensor that nothing uses, and a warning is an error here


@slow
def test_an_expert_that_no_text_reached_says_so_and_its_scales_are_of_its_weights(quantized):
    out = quantized("glm4_moe")
    notes = json.loads((out / "quant_model_description.json").read_text())["kvc8"]
    missed = notes["experts_not_reached"]
    assert 12 - 3 * 3 <= len(missed) < 12
    stored = load_file(out / "quant_model_weight_w8a8.safetensors")
    for name in (f"{expert}.{part}_proj" for expert in missed for part in ("gate", "up", "down")):
        codes, scale = (stored[f"{name}.{part}"] for part in ("weight", "weight_scale"))
        assert (codes.abs().amax(1) == 127).all()
        assert (scale.isfinite() & (scale > 0)).all()


@slow
def test_every_pass_keeps_its_contract_where_experts_are_divided(quantized):
    """Each rank quantizes its part of a token by a scale of its own, within the bound of shard."""
    checkpoint = open_checkpoint(quantized("qwen3_moe"))
    verdicts = check_passes(checkpoint, capture(checkpoint, torch.float16), Options(ranks=2))
    assert [verdict.sentence for verdict in verdicts if verdict.sentence] == []
    [shard] = [verdict for verdict in verdicts if verdict.name == "shard"]
    sums = [site for site in shard.sites if 1e-6 < site.bound < 1]
    assert sums
    assert all(site.figure > 0 for site in sums)  # it is not the same, and this is not vacuous


@slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen3_moe", torch.float16), ("glm4_moe", torch.bfloat16)]
)
def test_every_pass_keeps_its_contract_in_every_phase(quantized, kind, dtype):
    checkpoint = open_checkpoint(quantized(kind))
    verdicts = check_passes(checkpoint, capture(checkpoint, dtype), pipeline.DEFAULT)
    assert [verdict.sentence for verdict in verdicts if verdict.sentence] == []


@slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_on_an_npu_every_phase_has_the_codes_of_the_reference_in_double_precision(quantized, kind):
    checkpoint = open_checkpoint(quantized(kind))
    # In float32, where npu_quant_matmul does not cut the scales of static linears to 19 bits.
    program, parameters = capture(checkpoint, torch.float32), Parameters(checkpoint.read)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program, Options(prefill_kv="int8"))
    want = replayed(dict.fromkeys(PHASES, program), parameters, TOKENS)
    for a, b in zip(want, replayed(lowered, parameters, TOKENS), strict=True):
        assert all(torch.equal(a[name][1], b[name][1].reshape(a[name][1].shape)) for name in a)


@slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_in_onnx_runtime_it_has_the_codes_of_the_reference_in_double_precision(quantized, kind):
    checkpoint = open_checkpoint(quantized(kind))
    program = capture(checkpoint, torch.float32)
    pipeline.run(program, pipeline.QUANTIZE)
    [row] = double_rows(checkpoint, program, Tokens(TOKENS[:9], TOKENS[9:]))
    assert row.codes is not None
    assert (row.codes.differ, row.greedy) == (0, row.calls)
    assert row.logits.largest < 1e-9  # of values near one


@slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_call_of_every_phase_is_legal(quantized, kind):
    program = capture(open_checkpoint(quantized(kind)), torch.float16)
    pipeline.run(program, pipeline.QUANTIZE)
    for phase in pipeline.lower_for_npu(program)[0].values():
        legality.check(phase, "ascend910b", 128)


LAUNCHES = (  # of the experts of a layer, on an NPU
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_dequant_swiglu_quant",
    "npu_grouped_matmul",
    "npu_moe_token_unpermute",
)


@slow
def test_the_launches_of_a_layers_experts(quantized):
    program = capture(open_checkpoint(quantized("qwen3_moe")), torch.float16)
    pipeline.run(program, pipeline.QUANTIZE)
    decode = pipeline.lower_for_npu(program)[0]["decode"]
    inside = [n for n in decode.graph.nodes if "layers.1.mlp" in n.meta.get("origin", "")]
    names = [str(n.target).split(".")[1] for n in inside if str(n.target).startswith("npu.")]
    assert tuple(names) == LAUNCHES


@slow
def test_a_router_stays_float_wherever_it_lies(tiny_model):
    """Hunyuan's is a module inside of one, and computes in float32."""
    of_its_own = {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "num_hidden_layers": 1}
    program = capture(open_checkpoint(tiny_model("hunyuan_v1_moe", **of_its_own)))
    modules = [site.module for site in sites(program)]
    assert [name for name in modules if ".mlp." in name] == [
        f"model.layers.0.mlp.shared_mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
