"""Dense models in W8A8_DYNAMIC and W8A8_MIX, with C8: from kvc8-quantize to an NPU and to ONNX."""

import functools
import json
from collections.abc import Callable

import pytest
import torch
from support.replayed import PHASES, replayed

import kvc8
from kvc8.backends.npu import legality
from kvc8.ir import npu, ops
from kvc8.ir.capture.accounts import account
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.quantizer.settings import Settings
from kvc8.tools.verifier.check_passes import check_passes
from kvc8.tools.verifier.form_table import double_rows
from kvc8.tools.verifier.forms import Tokens
from kvc8.tools.verifier.recording import Parameters

pytestmark = pytest.mark.slow
TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11, 7, 101, 2, 33]
ACTS = ("dynamic", "mix")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory) -> Callable[[str], Checkpoint]:
    """A Qwen3 of two layers whose linears, down_proj too, are all of one sort."""

    @functools.cache
    def quantized(act: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(act)
        (folder / "texts.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
        model = tiny_model("qwen3", num_hidden_layers=2)
        settings = Settings(act=act, down_proj=True)  # type: ignore[arg-type]
        out, texts = folder / "out", folder / "texts.jsonl"
        kvc8.quantize(model, out=out, calibration=texts, settings=settings)
        return open_checkpoint(out)

    return quantized


@pytest.mark.parametrize("act", ACTS)
def test_each_tensor_is_accounted_for(made, act):
    found = made(act)
    kind, label = {"dynamic": ("dynamic", "W8A8_DYNAMIC"), "mix": ("mixed", "W8A8_MIX")}[act]
    assert [linear.activations for linear in found.w8a8.values()] == [kind] * 2 * 7
    said = json.loads((found.path / "quant_model_description.json").read_text())
    assert said["model_quant_type"] == label
    assert (found.warnings, account(found, capture(found))) == ((), [])


def test_on_an_npu_every_phase_has_the_codes_of_the_reference_in_double_precision(made):
    checkpoint = made("mix")
    assert [
        v.sentence
        for v in check_passes(checkpoint, capture(checkpoint), pipeline.DEFAULT)
        if v.sentence
    ] == []
    program, parameters = capture(checkpoint, torch.float32), Parameters(checkpoint.read)
    pipeline.run(program, pipeline.QUANTIZE)
    assert len(program.calls(ops.dynamic_linear)) == 2 * 7
    lowered, _ = pipeline.lower_for_npu(program, Options(prefill_kv="int8"))
    want = replayed(dict.fromkeys(PHASES, program), parameters, TOKENS)
    for a, b in zip(want, replayed(lowered, parameters, TOKENS), strict=True):
        assert all(torch.equal(a[name][1], b[name][1].reshape(a[name][1].shape)) for name in a)


def test_every_call_is_legal_and_takes_a_scale_a_token(made):
    program = capture(made("mix"), torch.float16)
    pipeline.run(program, pipeline.QUANTIZE)
    for phase in pipeline.lower_for_npu(program)[0].values():
        legality.check(phase, "ascend910b", 128)
        products = phase.calls(npu.npu_quant_matmul)
        assert products
        assert all(call.kwargs.get("pertoken_scale") is not None for call in products)


def test_in_onnx_runtime_it_has_the_codes_of_the_reference_in_double_precision(made):
    checkpoint = made("mix")
    program = capture(checkpoint, torch.float32)
    pipeline.run(program, pipeline.QUANTIZE)
    [row] = double_rows(checkpoint, program, Tokens(TOKENS[:9], TOKENS[9:]))
    assert row.codes is not None
    assert (row.codes.differ, row.greedy) == (0, row.calls)


def test_both_compute_the_same_for_a_mixed_linear_is_taken_dynamically(made):
    """The weights and their scales are stored alike, and what is static of W8A8_MIX has no say."""
    programs = [capture(made(act), torch.float32) for act in ACTS]
    caches = []
    for act, program in zip(ACTS, programs, strict=True):
        pipeline.run(program, pipeline.QUANTIZE)
        same, parameters = dict.fromkeys(PHASES, program), Parameters(made(act).read)
        caches.append(replayed(same, parameters, TOKENS)[-1])
    assert all(torch.equal(caches[0][name][1], caches[1][name][1]) for name in caches[0])
