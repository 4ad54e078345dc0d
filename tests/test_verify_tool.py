"""kvc8-verify: what it promises, and what it says where a promise is broken."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.precision.widen import widen
from kvc8.ir.text import parse, show
from kvc8.passes import pipeline
from kvc8.tools import command, verify
from kvc8.tools.verifier.compare import CodesOfForm, FormRow, compare
from kvc8.tools.verifier.form_table import broken_promises
from kvc8.tools.verifier.forms import Run, Tokens, in_onnxruntime, one_program
from kvc8.tools.verifier.gaps import Gap

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
LLAMA = CHECKPOINTS / "llama_fp16_m3" / "quant"
ASYMMETRIC = CHECKPOINTS / "qwen2_fp16_none_asym" / "quant"
SAME = {"by": (0, 0, 0), "saturated": 0.0}
AGREE = CodesOfForm(differ=0, of=100, **SAME, most=0, first=None, same_inputs=0)
ROW = FormRow("ONNX Runtime f64", "reference f64", Gap(1e-9, 1e-9), 0.0, 33, 33, AGREE)
REPORT = "report it with the output of --json"


@functools.cache
def reference(directory: Path):
    """A checkpoint and its QUANTIZED program, which no test changes."""
    checkpoint = open_checkpoint(directory)
    program = capture(checkpoint, torch.float32)
    pipeline.run(program, pipeline.QUANTIZE)
    return checkpoint, program


@pytest.mark.slow
@pytest.mark.parametrize("directory", [LLAMA, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_in_double_precision_onnx_runtime_agrees_to_many_digits(directory):
    """Sums of n terms round by n * 2**-53 each: for n < 1000 and a few dozen sums, below 1e-10."""
    checkpoint, program = reference(directory)
    tokens = Tokens([5 + i % 50 for i in range(140)], [3, 4, 5])
    wide = widen(program)
    base, made = (run(wide, checkpoint, tokens) for run in (one_program, in_onnxruntime))
    row = compare("ONNX Runtime f64", made, "reference f64", base, tokens)
    assert row.logits.largest < 1e-10
    assert (row.greedy, row.calls) == (4, 4)
    assert row.codes is not None
    assert row.codes.differ == 0
    assert broken_promises(row) == []


def test_a_widened_program_is_the_same_but_for_its_floats():
    _, program = reference(LLAMA)
    text = show(widen(program))
    assert show(parse(text)) == text
    assert widen(program).stage is program.stage
    narrow, wide = (show(p).replace("f64", "f32").splitlines() for p in (program, widen(program)))
    calls = [line for line in narrow if "= kvc8." in line or "= aten." in line]
    assert calls == [line for line in wide if "= kvc8." in line or "= aten." in line]


def test_after_lowering_sizes_are_as_free_as_before():
    """The NPU's attention takes one as a plain int, which once fixed it to a rule's trial value."""
    _, program = reference(LLAMA)
    before = show(widen(program))
    pipeline.lower_for_npu(program)
    assert show(widen(program)) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"codes": replace(AGREE, differ=3, most=1, first=2)},
            f"ONNX Runtime f64: 3 of 100 int8 codes differ from reference f64; {REPORT}",
        ),
        (
            {"codes": replace(AGREE, differ=3, same_inputs=3), "form": "ONNX Runtime f32"},
            f"ONNX Runtime f32: 3 int8 codes differ though their inputs are equal; {REPORT}",
        ),
        ({"greedy": 31}, f"ONNX Runtime f64: 2 greedy tokens differ from reference f64; {REPORT}"),
        (
            {"logits": Gap(0.002, 0.0)},
            "ONNX Runtime f64: logits differ by 0.002 from reference f64, more than 0.001; "
            "compile with --dump and compare the programs",
        ),
        (
            {"logits": Gap(float("nan"), 0.0), "form": "NPU emulated f32"},
            "NPU emulated f32: logits differ by nan from reference f64, more than 0.001; "
            "compile with --dump and compare the programs",
        ),
    ],
)
def test_a_broken_promise_is_one_sentence(change, sentence):
    assert broken_promises(ROW) == []
    assert broken_promises(replace(ROW, **change)) == [sentence]


def test_a_code_that_differs_on_equal_inputs_is_counted():
    tokens = Tokens([1, 2], [])
    cache = torch.zeros(1, 128, 1, 2, dtype=torch.int8)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    base = Run([torch.zeros(1, 5)], {"k": cache}, {"k": [rows]})
    other = cache.clone()
    other[0, 1, 0] = torch.tensor([2, -1])
    made = Run([torch.zeros(1, 5)], {"k": other}, {"k": [rows + torch.tensor([0.0, 1.0])]})
    row = compare("made", made, "base", base, tokens)
    assert row.codes == CodesOfForm(
        differ=2, of=4, by=(1, 1, 0), saturated=0.0, most=2, first=0, same_inputs=1
    )


@pytest.mark.slow
def test_the_command_prints_a_table(capsys):
    options = ["forms", str(LLAMA), "--tokens", "20", "--steps", "3", "--tp", "2"]
    assert command.entry(verify.parser(), verify.work, options) == 0
    said = capsys.readouterr().out
    assert "against reference f32" in said
    assert "against reference f64" in said
    assert sum(line.startswith("all ranks f64") for line in said.splitlines()) == 2  # with codes
    assert "they were not verified on a device" in said
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80


@pytest.mark.slow
def test_phases_are_compared_with_a_prompt_taken_whole(capsys):
    options = ["phases", str(LLAMA), "--tokens", "70", "--steps", "2", "--json"]
    assert command.entry(verify.parser(), verify.work, options) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in rows] == [
        *("chunks of 64, int8 f32", "by tokens, int8 f32"),
        *("whole, float f32", "chunks of 64, float f32", "by tokens, float f32"),
        *("chunks of 64, reference f64", "by tokens, reference f64"),
    ]
    assert {row["codes"]["same_inputs"] for row in rows} == {0}
    assert {row["codes"]["differ"] for row in rows if row["form"].endswith("f64")} == {0}
