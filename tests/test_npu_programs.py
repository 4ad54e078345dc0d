"""Every NPU call of every lowered program fits the schema that torch_npu 2.13.0 has for it."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.npu_calls import misfits, npu_calls
from support.onnx_models import captured

from kvc8.ir.text import parse
from kvc8.passes import pipeline
from kvc8.passes.options import Options

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
MODELS = ["llama_fp16_m3", "qwen2_fp16_none_asym", "v1_qwen2_fp16_w8a8c8"]
DTYPES = [torch.float16, torch.bfloat16]
CALL = """
def lowered(x: f16[T, 64], s: f32[64] = stored("s")):
    codes: i8[T, 64] = npu.npu_quantize(x, s, None, 1, -1, True)
    return [codes]
"""


def test_a_call_that_does_not_fit_is_noticed() -> None:
    program = parse(CALL)
    node, *_ = npu_calls(program)
    x, s, *_ = node.args
    assert misfits(node) == []
    node.args = (x, s, 0.5, 1)
    assert misfits(node) == ["zero_points is 0.5"]
    node.args, node.kwargs = (x, s, None), {"div": True}
    assert misfits(node) == ["dtype is missing", "div is unknown"]
    node.args, node.kwargs = (x, s, None, 1, -1, True, 0), {}
    assert misfits(node) == ["7 arguments"]


@pytest.mark.slow  # captures models
@pytest.mark.parametrize("fuse", ["on", "off"])
@pytest.mark.parametrize("model", MODELS)
def test_every_call_fits_its_recorded_schema(model: str, fuse: str) -> None:
    seen: Counter[str] = Counter()
    for dtype in DTYPES:
        program = captured(CHECKPOINTS / model / "quant", dtype)
        pipeline.run(program, pipeline.QUANTIZE)
        for phase, lowered in pipeline.lower_for_npu(program, Options(fuse=fuse))[0].items():
            for node in npu_calls(lowered):
                assert misfits(node) == [], (phase, node.format_node())
                seen[str(node.target)] += 1
    assert len(seen) >= 4
    assert seen.total() > 100  # four layers, two phases, two dtypes
