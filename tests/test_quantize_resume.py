"""A quantizer that is killed goes on to the same bytes; shards; a budget of memory."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import forked

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools import command, quantize
from kvc8.tools.quantizer import quantizing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # nothing but work() runs
]
WEIGHTS = "quant_model_weight_w8a8.safetensors"
KILLS = 20
VENDOR = ("--act_method", "3", "--anti_method", "m3")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = ["The sea is a very large thing.", "12 + 30 = 42", "def f(x): return x"] * 2
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return path


def arguments(model: Path, out: Path, texts: Path, *options: str) -> list[str]:
    return [str(model), "-o", str(out), "--calib-file", str(texts), *options]


def quantize_(*given: str) -> int:
    return command.entry(quantize.parser(), quantize.work, given)


def start(given: list[str]) -> int:
    """A process that quantizes; its number."""
    return forked.started(lambda: quantize_(*given))


@pytest.mark.parametrize("options", [VENDOR, ("--rollback", "30")], ids=["msmodelslim", "kvc8"])
def test_killed_at_random_moments_and_resumed(options, tiny_model, texts, tmp_path, monkeypatch):
    """Killed by SIGKILL within the time a run takes, 20 times in all, until each run is through.

    The model is captured once, so that the moments fall into the work itself.
    """
    model = tiny_model("llama", num_hidden_layers=2)
    dtype = torch.float32
    program = capture(open_checkpoint(model), dtype)
    monkeypatch.setattr(quantizing, "capture", lambda *_: program)
    begun = time.monotonic()
    assert forked.ended(start(arguments(model, tmp_path / "whole", texts, *options))) == 0
    takes = time.monotonic() - begun
    want = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    moments, killed, runs = random.Random(7), 0, 0
    while killed < KILLS:
        out, runs = tmp_path / f"out{runs}", runs + 1
        done = False
        while not done:
            pid = start(arguments(model, out, texts, *options, "--resume"))
            if killed < KILLS:
                time.sleep(moments.uniform(0, takes))
                os.kill(pid, signal.SIGKILL)
            status = forked.ended(pid)
            killed += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL) or out.exists()
            done = out.exists()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == want
    # Killed after the renaming, a run leaves its state, which the next run there removes.
    assert not [path for path in tmp_path.glob(".*.part") if (path / "whole").exists()]


def interrupted(monkeypatch, *given: str) -> int:
    """A run that is interrupted when its weights are written."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("kvc8.tools.quantizer.model.write_json", stop)
        return quantize_(*given)


def test_what_is_unfinished_is_kept_and_asked_about(
    tiny_model, texts, tmp_path, monkeypatch, capsys
):
    model, out = tiny_model("llama", num_hidden_layers=2), tmp_path / "out"
    given = arguments(model, out, texts, "--down-proj")
    capsys.readouterr()  # a tiny model's making shows progress
    assert interrupted(monkeypatch, *given) == 130
    assert capsys.readouterr().err == f"{out}: interrupted; --resume goes on\n"
    assert not out.exists()
    assert quantize_(*given) == 1
    assert capsys.readouterr().err == (
        f"error: {out}: an unfinished run is beside it; give --resume, or remove .out.part\n"
    )
    assert quantize_(*given[:-1], "--resume") == 1
    assert capsys.readouterr().err == (
        "error: --resume: the unfinished run has down_proj true and this one false; "
        "give the same options, or leave --resume out and remove its directory\n"
    )
    assert quantize_(*given, "--resume") == 0
    assert quantize_(*arguments(model, tmp_path / "b", texts, "--down-proj")) == 0
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert not (tmp_path / ".out.part").exists()


def test_shards_hold_what_one_file_holds(tiny_model, texts, tmp_path):
    model = tiny_model("qwen2")
    assert quantize_(*arguments(model, tmp_path / "one", texts, *VENDOR)) == 0
    options = (*VENDOR, "--part_file_size", "0.00005")  # 50 kB
    assert quantize_(*arguments(model, tmp_path / "many", texts, *options)) == 0
    want, found = load_file(tmp_path / "one" / WEIGHTS), open_checkpoint(tmp_path / "many")
    index = json.loads((tmp_path / "many" / f"{WEIGHTS}.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    count = len(files)
    assert count > 3
    stem = WEIGHTS.removesuffix(".safetensors")
    assert files == [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert (found.warnings, set(found.tensors)) == ((), set(want))
    for name, tensor in want.items():
        assert torch.equal(found.read(name), tensor)


def test_too_small_a_budget_is_refused_with_what_is_needed(tiny_model, texts, tmp_path, capsys):
    given = arguments(tiny_model("llama"), tmp_path / "out", texts, "--memory")
    assert quantize_(*given, "1M") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --memory: 0.00 GB is not enough for this model and texts of ")
    least = said.rpartition("give at least ")[2].strip()
    assert quantize_(*given, f"{int(least.removesuffix('M')) + 200}M") == 0
