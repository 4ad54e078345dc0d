"""The published C8 checkpoints, by their shapes and labels: read, accounted for, and lowered."""

import warnings

import pytest
import torch
from support.flagships import FLAGSHIPS, write_flagship

from kvc8.backends.npu import legality
from kvc8.ir.capture.accounts import account
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelWarning
from kvc8.passes import pipeline

# In four layers: how many linears take their input by token, and how many could do both.
LINEARS = {
    "Qwen3-32B-w8a8c8": {"mixed": 4 * 7},
    "Qwen3-30B-A3B": {"static": 4 * 4, "dynamic": 4 * 128 * 3},
    "GLM-4.7-W8A8C8": {"dynamic": 4 * 4 + 160 * 3},  # three layers are dense, and float
    "MiniMax-M2.7-w8a8c8-QuaRot": {"dynamic": 4 * (4 + 256 * 3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGSHIPS)
def test_a_flagship_is_read_and_each_tensor_has_its_place_on_an_npu(name, tmp_path):
    checkpoint = open_checkpoint(write_flagship(tmp_path / "model", name, layers=4))
    assert (checkpoint.layout, checkpoint.kv_calibrated) == ("msmodelslim-v1", "post-rope")
    assert (checkpoint.warnings, len(checkpoint.kv)) == ((), 4)
    kinds = [linear.activations for linear in checkpoint.w8a8.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == LINEARS[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ModelWarning)
        program = capture(checkpoint, torch.bfloat16)
    assert [w.message.what for w in told if isinstance(w.message, ModelWarning)] == [
        "every kv_cache_scale is zero, so the shards hold no data"
    ]
    assert account(checkpoint, program) == []
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    for phase in ("prefill", "chunk", "decode"):
        legality.check(lowered[phase], "ascend910b", 128)
