"""kvc8-run on ONNX directories: what the NPU artifact generates, every flavor generates."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.onnx_models import QUANTIZED, quantized

from kvc8.backends.npu.artifact import CompiledFor, write
from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.lowered import emit_lowered
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools import run

pytestmark = pytest.mark.slow  # loads ONNX Runtime

GOLDEN = QUANTIZED[0]
FLAVORS = ("standard", "gqa", "lowered")
PROMPTS = ["--prompt", "hello", "--prompt", "a b c", "--prompt", "quantized caches"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One program as an artifact and in every flavor, all in float32 and from the same int8 K."""
    program, checkpoint = quantized(GOLDEN), open_checkpoint(GOLDEN)
    folder = tmp_path_factory.mktemp("run")
    lowered, _ = pipeline.lower_for_npu(program, Options(prefill_kv="int8"))
    write(folder / "npu", checkpoint, lowered, CompiledFor("ascend910b", 32))
    emit(program, checkpoint, folder / "standard")
    emit(program, checkpoint, folder / "gqa", "gqa")
    emit_lowered(lowered, checkpoint, folder / "lowered")
    return {name: folder / name for name in ("npu", *FLAVORS)}


def tokens(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[int]]:
    assert run.main([*map(str, arguments), "--json"]) == 0
    return [sequence["tokens"] for sequence in json.loads(capsys.readouterr()[0])["sequences"]]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_it_generates_what_the_artifact_does_whatever_fits_the_cache(flavor, made, capsys):
    more = (*PROMPTS, "--max-new-tokens", 9)
    want = tokens(capsys, made["npu"], *more)
    assert all(len(sequence) == 9 for sequence in want)
    assert tokens(capsys, made[flavor], *more) == want
    for blocks in (1, 2):  # some wait, and in a dense cache some rest
        assert tokens(capsys, made[flavor], *more, "--blocks", blocks) == want


@pytest.mark.parametrize("flavor", FLAVORS)
def test_it_says_where_it_ran_and_what_a_token_costs(flavor, made, capsys):
    assert run.main([str(made[flavor]), "--prompt", "hey", "--max-new-tokens", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr()[0])
    assert found["note"] == f"run in ONNX Runtime on a CPU, flavor {flavor}"
    assert found["statistics"]["bytes_per_token"] == 512
    assert found["statistics"]["cache_bytes_allocated"] > 0


def test_an_onnx_model_on_an_npu_and_a_damaged_one_are_refused(made, capsys, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_device", lambda name: torch.device("meta"))
        assert run.main([str(made["gqa"]), "--prompt", "hey", "--device", "npu"]) == 1
    assert capsys.readouterr()[1] == (
        "error: --device: an ONNX model runs in ONNX Runtime on a CPU; leave it out, or compile "
        "the model for npu\n"
    )
    shutil.copytree(made["gqa"], tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, "caches": [{}]}))
    assert run.main([str(tmp_path / "out"), "--prompt", "hey"]) == 1
    where = place(tmp_path / "out" / "manifest.json")
    assert capsys.readouterr()[1] == (
        f"error: {where}: caches are not what kvc8-compile writes; compile it again\n"
    )
