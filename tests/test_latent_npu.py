"""Attention to latents on an NPU: what is emulated computes what transformers computes."""

from functools import partial

import pytest
import torch
from support.architectures import others
from support.pass_docs import load as documented

import kvc8
from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.model import load
from kvc8.ir import npu
from kvc8.ir.capture.original import open_original
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.expression import make
from kvc8.ir.text import parse
from kvc8.passes import pipeline
from kvc8.passes.lower_latent_attention import lower_latent_attention
from kvc8.passes.options import Options
from kvc8.tools.verifier.check_passes import check_passes

BLOCK = 128
# What the ops take of latents, in an architecture with a mixture of grouped experts.
SIZES = {
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    **{"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    "num_hidden_layers": 2,
}
TEXTS = ([5, 17, 42, 99, 3, 64, 80, 23, 11, 71], [9, 100, 31, 4])
PARTS = {"prefill": [(0, 4), (0, 2)], "chunk": [(4, 9), (2, 4)], "decode": [(9, 10)]}


@pytest.fixture(scope="module")
def directories(tiny_model):
    latent = {**others(16)["deepseek_v3"], **SIZES}
    half = {**others(16)["minicpm3"], "num_hidden_layers": 2}
    return {
        "deepseek_v3": tiny_model("deepseek_v3", **latent),
        "minicpm3": tiny_model("minicpm3", **half),  # of widths that the ops do not take
    }


def logits(model):
    """What a model gives for the last token of each part, by phase."""
    found = {}
    for phase, parts in PARTS.items():
        each = zip(TEXTS, parts, ([2], [0]), strict=False)
        rows = [Rows(text[a:b], a, table) for text, (a, b), table in each]
        found[phase] = model.mixed(rows)
    return found


@pytest.mark.slow
def test_every_phase_computes_what_transformers_computes(directories):
    checkpoint = open_checkpoint(directories["deepseek_v3"])
    program = capture(checkpoint, torch.float32)
    pipeline.run(program, pipeline.quantize_passes(Options()))
    programs, _ = pipeline.lower_for_npu(program)
    model = load(programs, partial(make, read=checkpoint.read), blocks=3, block_size=BLOCK)
    original = open_original(checkpoint, torch.float32)
    theirs = [original.run(text)[0] for text in TEXTS]
    for phase, found in logits(model).items():
        ends = [end - 1 for _, end in PARTS[phase]]
        want = torch.stack([full[end] for full, end in zip(theirs, ends, strict=False)])
        assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max()), phase
    attention = [p.calls(npu.npu_fused_infer_attention_score)[0].kwargs for p in programs.values()]
    assert [kwargs["num_key_value_heads"] for kwargs in attention] == [4, 4, 1]


@pytest.mark.slow
def test_every_pass_keeps_its_contract(directories):
    checkpoint = open_checkpoint(directories["deepseek_v3"])
    verdicts = check_passes(checkpoint, capture(checkpoint, torch.float32), Options())
    assert [verdict.sentence for verdict in verdicts if verdict.sentence] == []
    held = {verdict.name: len(verdict.sites) for verdict in verdicts if verdict.sites}
    assert held["fold_latent_attention"] > 0
    assert held["lower_latent_attention"] > 0


@pytest.mark.slow
def test_an_artifact_of_latents_in_float16_is_read_back_and_runs(directories, tmp_path):
    """Of the sizes that the ops take: 512 + 64 channels a token of each of two layers."""
    directory, out = directories["deepseek_v3"], tmp_path / "out"
    made = kvc8.compile(directory, target="npu", out=out, dtype="float16")
    assert made.layout.bytes_per_token == 2 * (512 + 64) * 2
    artifact = read(out)
    model = load(artifact.programs, artifact.make, blocks=3, block_size=BLOCK)
    given = partial(make, read=open_checkpoint(directory).read)
    again = load(made.phases, given, blocks=3, block_size=BLOCK)
    for (phase, a), b in zip(logits(model).items(), logits(again).values(), strict=True):
        assert torch.equal(a, b), phase
        assert a.isfinite().all(), phase


@pytest.mark.slow
def test_widths_that_the_op_does_not_take_are_refused_with_their_source(directories, tmp_path):
    with pytest.raises(TargetError) as refused:
        kvc8.compile(directories["minicpm3"], target="npu", out=tmp_path / "out", dtype="float16")
    source = "op-plugin docs/zh/custom_APIs/torch_npu/npu_fused_infer_attention_score.md, MLA"
    assert str(refused.value) == (
        "model.layers.0.self_attn: npu_fused_infer_attention_score on ascend910b takes rotated "
        f"channels 64, and this is 16 ({source}); compile for onnx instead"
    )


def test_a_window_over_latents_is_left_alone():
    text = documented("lower_latent_attention")[1][2].replace("0.2, 0, 0.0", "0.2, 8, 0.0")
    program = parse(text)
    assert [str(remark) for remark in lower_latent_attention(program)] == [
        "attention_1 left as it was: no op of the NPU attends to latents in a window, capped or "
        "with sinks"
    ]
