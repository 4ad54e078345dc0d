"""The figures of each pass: culprits and victims are told apart, and values found by provenance."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import planted
import pytest
import torch

from kvc8.ir.capture import capture
from kvc8.ir.checkpoint import open_checkpoint
from kvc8.passes import pipeline
from kvc8.tools.check_passes import check_steps
from kvc8.tools.contracts import Call, check
from kvc8.tools.recording import Parameters, empty, feed, record
from kvc8.tools.values import Chain, decibels, largest_error, relative_rms

LLAMA = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
PROMPT = feed([5, 9, 17, 33, 65, 12, 101, 7])


def test_relative_rms_is_of_the_error_to_the_signal():
    old = torch.tensor([3.0, 4.0, float("-inf")])
    assert relative_rms(old, old.clone()) == 0
    new = torch.tensor([3.0, 4.5, float("-inf")])
    assert relative_rms(old, new) == pytest.approx(0.5 / 5, rel=1e-15)
    assert relative_rms(torch.zeros(2), torch.ones(2)) == 1
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_rms(torch.ones(2), torch.tensor([1.0, math.nan])) == math.inf


def test_the_largest_error_leaves_out_what_was_not_finite():
    old = torch.tensor([1.0, float("-inf"), 2.0])
    assert largest_error(old, torch.tensor([1.25, float("-inf"), 2.0])) == 0.25
    assert largest_error(old, torch.tensor([math.nan, float("-inf"), 2.0])) == math.inf


def test_decibels_of_a_tenth_are_twenty_and_of_nothing_none():
    assert decibels(0.1) == pytest.approx(20, rel=1e-15)
    assert decibels(0.0) is None
    assert decibels(math.inf) is None


@pytest.mark.slow
def test_a_fault_is_the_culprit_of_its_layer_and_the_layers_after_it_are_victims():
    checkpoint = open_checkpoint(LLAMA)
    program, parameters = capture(checkpoint, torch.float32), Parameters(checkpoint.read)
    pipeline.run(program, pipeline.QUANTIZE)
    start = record(program, parameters, PROMPT.inputs(program), empty(program)).caches
    shared, _ = pipeline.phases()["decode"]
    names = [step.name for step in shared]
    broken = planted.plant(shared[names.index("fuse_linears")], planted.swapped_gate_and_up)
    steps = (*shared[: names.index("fuse_linears")], broken)
    chain = Chain()
    check(program, steps, [Call(feed([7], 8), start)], parameters, chain.see)
    found = [figure for figure in chain.figures if figure.step == "fuse_linears"]
    assert {figure.layer for figure in found if figure.offends} == {"layer 1"}
    worst = {layer: 0.0 for layer in ("layer 0", "layer 1", "layer 2", "layer 3")}
    for figure in found:
        if figure.layer in worst:
            worst[figure.layer] = max(worst[figure.layer], figure.accumulated or 0.0)
    assert worst["layer 0"] == 0
    assert min(worst["layer 1"], worst["layer 2"], worst["layer 3"]) > 0.01
    [logits] = [each for each in chain.logits if each.step == "fuse_linears"]
    assert logits.kl > 0
    assert logits.snr == decibels(logits.rms)
    [before] = [each for each in chain.logits if each.step == "fold_v_offset"]
    assert (before.max_abs, before.rms, before.snr, before.kl) == (0, 0, None, 0)
    assert before.top1


@pytest.mark.slow
def test_values_are_followed_through_all_passes_and_can_be_written_as_json():
    chain = Chain()
    check_steps(
        open_checkpoint(LLAMA), pipeline.QUANTIZE, pipeline.phases(), torch.float32, chain.see
    )
    told = json.loads(json.dumps([asdict(figure) for figure in chain.figures], allow_nan=False))
    layers = {f"layer {i}" for i in range(4)}
    for phase in ("prefill", "chunk", "decode"):
        last = [f for f in told if (f["step"], f["phase"]) == ("fuse_swiglu_quant", phase)]
        followed = {f["layer"] for f in last if f["accumulated"] is not None}
        assert layers <= followed
    # Isolated, no pass may move a code by more than one in float32: what fuse_norm_quant's module
    # derives, the widest of the bounds that these passes declare.
    codes = [figure.codes for figure in chain.figures if figure.codes]
    assert codes
    assert all(sum(counts[2:]) == 0 for counts in codes)
    assert all(0 <= f.saturation <= 1 for f in chain.figures if f.saturation is not None)
