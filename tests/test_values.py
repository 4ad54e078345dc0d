"""What kvc8-verify says of values: own errors beside those that came from upstream."""

import json
import math
from pathlib import Path

import pytest
import torch

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.tools import command, compile, verify
from kvc8.tools.verifier.check_passes import check_steps, watch_values
from kvc8.tools.verifier.gaps import CodeGap, Gap, codes, gap
from kvc8.tools.verifier.pass_table import largest

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
LLAMA = CHECKPOINTS / "llama_fp16_m3" / "quant"


def test_a_gap_is_the_largest_difference_and_the_noise():
    old, new = torch.tensor([3.0, -4.0, math.inf]), torch.tensor([3.0, -4.5, math.inf])
    found = gap(old, new)
    assert found.largest == 0.5
    # sqrt(0.25 / 25): the mean squares are over as many elements, so their number cancels
    assert found.relative == pytest.approx(0.1, rel=1e-12)
    assert found.snr == pytest.approx(20, rel=1e-12)
    assert gap(old, old) == Gap(0.0, 0.0)
    assert gap(old, old).snr == math.inf


def test_codes_are_counted_by_how_far_they_are_off():
    old = torch.tensor([1, 2, 3, 4, -128], dtype=torch.int8)
    new = torch.tensor([1, 3, 1, 127, -128], dtype=torch.int8)
    assert codes(old, new) == CodeGap(by=(1, 1, 1), of=5, saturated=0.4)


@pytest.mark.slow
def test_a_victim_has_no_error_of_its_own():
    """Quantizing the cache is the culprit; folding scales, which is exact, comes after it."""
    checkpoint = open_checkpoint(LLAMA)
    captured = capture(checkpoint, torch.float32)
    values = watch_values(checkpoint, captured)
    phases = {"decode": (pipeline.FOLD_OFFSETS[:1], ())}
    verdicts = check_steps(checkpoint, captured, pipeline.AS_IS, phases, values.see)
    assert [verdict.name for verdict in verdicts] == [measured.name for measured in values.passes]
    quantized, folded = values.passes[-2:]
    assert (quantized.name, folded.name) == ("insert_kv_quant", "fold_kv_scales")
    for value in quantized.values:
        assert isinstance(value.own, Gap)
        assert value.own.relative > 0
        assert value.total is not None
        if value.layer != "layer 0":  # which W8A8 has not reached
            assert value.total.relative > value.own.relative
    read = [value for value in folded.values if isinstance(value.own, Gap)]
    assert {value.own.relative for value in read} == {0.0}
    assert all(value.total is not None and value.total.relative > 0 for value in read)
    assert {name for name, _ in largest([quantized, folded], 100)} == {"insert_kv_quant"}


@pytest.mark.slow
def test_everything_in_one_command_and_what_was_compiled(tmp_path, capsys):
    out = tmp_path / "out"
    given = [str(LLAMA), "--target", "npu", "-o", str(out)]
    assert command.entry(compile.parser(), compile.work, given) == 0
    capsys.readouterr()
    options = ["--tokens", "20", "--steps", "2", "--json"]
    assert command.entry(verify.parser(), verify.work, ["all", str(LLAMA), str(out), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["forms", "passes", "sensitivity"]
    forms = {row.pop("form"): row for row in found["forms"]}
    assert list(forms) == [
        *(
            "transformers f64",
            "float cache f32",
            "reference f64",
            "NPU emulated f32",
            "ONNX Runtime f32",
        ),
        *("NPU emulated f16", "ONNX Runtime gqa", str(out), "ONNX Runtime f64"),
    ]
    same = {form: row["codes"]["same_inputs"] for form, row in forms.items() if row["codes"]}
    for unseen in ("NPU emulated f16", "ONNX Runtime gqa", str(out)):
        assert same.pop(unseen) is None  # they quantize what they compute themselves
    assert set(same.values()) == {0}
    # the same programs, written and read back
    assert forms[str(out)] == {**forms["NPU emulated f16"], "codes": forms[str(out)]["codes"]}
    assert forms[str(out)]["codes"]["by"] == forms["NPU emulated f16"]["codes"]["by"]
    assert all(each["values"] for each in found["passes"] if each["sites"])
    assert found["sensitivity"][-1]["layer"] == "all"


def test_a_compiled_model_alone_says_nothing_of_what_it_should_compute(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    assert command.entry(verify.parser(), verify.work, ["forms", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: is a compiled model, which does not say what it should compute; "
        "name the model that it was compiled from, and then this\n"
    )
