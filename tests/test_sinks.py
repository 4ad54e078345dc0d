"""Attention sinks on an NPU: one more logit a head, beside an op that has none."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.replayed import PHASES, replayed
from torch import Tensor

import kvc8
from kvc8.backends.npu import legality
from kvc8.backends.npu.emulation import attention
from kvc8.ir import npu
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.verifier.check_passes import check_passes
from kvc8.tools.verifier.recording import Parameters

TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11, 7, 101, 2, 33]
# Both have sinks, and windows in every other layer; experts of the second have biases.
KINDS: dict[str, dict[str, object]] = {
    "granite_swa": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gpt_oss": {"sliding_window": 8, "head_dim": 32},
}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "TND"])
def test_the_log_of_the_sums_is_that_of_a_softmax_in_float64(layout):
    """Two sequences of 5 rows, 4 heads over 2, causal."""
    q, k, v = rows(2, 5, 4, 32), rows(2, 5, 2, 32, seed=1), rows(2, 5, 2, 32, seed=2)
    lay: dict[str, Callable[[Tensor], Tensor]] = {
        "BSH": lambda x: x.flatten(2),
        "BSND": lambda x: x,
        "BNSD": lambda x: x.transpose(1, 2).contiguous(),
        "TND": lambda x: x.flatten(0, 1),
    }
    ends = {"actual_seq_lengths": [5, 10], "actual_seq_lengths_kv": [5, 10]}
    _, lse = attention.npu_fused_infer_attention_score(
        *map(lay[layout], (q, k, v)),
        **(ends if layout == "TND" else {}),
        **{"num_heads": 4, "num_key_value_heads": 2, "scale": 0.25, "input_layout": layout},
        atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1),
        sparse_mode=3,
        softmax_lse_flag=True,
    )
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) / 4
    want = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).logsumexp(-1)
    want = want.transpose(1, 2).flatten(0, 1)[..., None] if layout == "TND" else want[..., None]
    assert (lse.dtype, lse.shape) == (torch.float32, want.shape)
    # 32 products and their sum, 5 exponentials and theirs, a logarithm: of values under 8.
    assert (lse - want).abs().max() < (32 + 5 + 4) * 2**-24 * 8


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory) -> Callable[[str], Path]:
    """A kind's model in W8A8 with C8."""

    @functools.cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        (folder / "texts.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
        sizes = {"num_hidden_layers": 2, "hidden_size": 128, **KINDS[kind]}
        model = tiny_model(kind, **sizes)
        kvc8.quantize(model, out=folder / "out", calibration=folder / "texts.jsonl")
        return folder / "out"

    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_keeps_its_contract_and_every_call_is_legal(quantized, kind):
    checkpoint = open_checkpoint(quantized(kind))
    program = capture(checkpoint, torch.float16)
    options = Options(prefill_kv="int8", fold="kv")
    verdicts = check_passes(checkpoint, program, options)
    assert [verdict.sentence for verdict in verdicts if verdict.sentence] == []
    pipeline.run(program, pipeline.QUANTIZE)
    for phase in pipeline.lower_for_npu(program)[0].values():
        legality.check(phase, "ascend910b", 128)
        calls = phase.calls(npu.npu_fused_infer_attention_score)
        assert [call.kwargs["softmax_lse_flag"] for call in calls] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_phase_has_the_codes_of_the_reference_in_double_precision(quantized, kind):
    checkpoint = open_checkpoint(quantized(kind))
    program, parameters = capture(checkpoint, torch.float32), Parameters(checkpoint.read)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program, Options(prefill_kv="int8"))
    want = replayed(dict.fromkeys(PHASES, program), parameters, TOKENS)
    for a, b in zip(want, replayed(lowered, parameters, TOKENS), strict=True):
        assert all(torch.equal(a[name][1], b[name][1].reshape(a[name][1].shape)) for name in a)
