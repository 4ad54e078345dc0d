"""kvc8-verify dump: of a device that computes one node otherwise, that node is named."""

import json
from pathlib import Path

import pytest
import torch

from kvc8.backends.npu.artifact import CompiledFor, write
from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.npu.dumps import ValueDump
from kvc8.backends.runtime import model as runtime
from kvc8.ir import npu
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.tools import verify

LLAMA = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"


def shifted(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """What a device that is wrong here gives."""
    return npu.npu_swiglu(x, *args, **kwargs) + 1


@pytest.mark.slow
def test_in_a_dump_the_culprit_is_told_from_its_victims(tmp_path, capsys):
    checkpoint = open_checkpoint(LLAMA)
    program = capture(checkpoint)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    out, dump = tmp_path / "out", tmp_path / "values.safetensors"
    write(out, checkpoint, lowered, CompiledFor("ascend910b", 32))
    device = read(out)
    culprit = device.programs["decode"].calls(npu.npu_swiglu)[1]
    culprit.target = shifted
    model = runtime.load(device.programs, device.make, blocks=2, block_size=32)
    model.runner = recording = ValueDump(device.programs)
    model.prefill([[5, 6, 7]], [[1, 0]])
    model.decode([8], [4], [[1, 0]])
    recording.write(dump)

    given = ["dump", str(out), str(dump)]
    assert verify.work(verify.parser().parse_args([*given, "--json"])) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["node"] for each in found if each["differ"]] == [culprit.name]
    names = [each["node"] for each in found if each["phase"] == "decode"]
    at = {each["node"]: each["accumulated"] for each in found if each["phase"] == "decode"}
    before, after = names[: names.index(culprit.name)], names[names.index(culprit.name) :]
    assert {at[name] for name in before} == {0}
    victims = {name for name in after if at[name]}
    assert len(victims) > len(set(after)) / 2  # the rest is of K and V, and views of caches
    assert verify.work(verify.parser().parse_args(given)) == 0
    said = capsys.readouterr().out
    assert f"decode {culprit.name} (model.layers.1." in said
    assert f"{len(victims) - 1} nodes more differ only because their inputs do" in said
