"""A tiny model through every command, in one process, as on any machine.

`tools/check-portable` runs it on an emulated CPU, where what a process starts runs on the real one.
"""

import json
from pathlib import Path

import pytest
from support.c8 import quantize_model

from kvc8.tools import compile as compiler
from kvc8.tools import run, verify
from kvc8.tools.command import entry

pytestmark = pytest.mark.slow  # every command loads what it needs

FORMS = {
    "npu": ("npu", "--dtype", "float16"),
    "standard": ("onnx",),
    "gqa": ("onnx", "--flavor", "gqa"),
    "lowered": ("onnx", "--flavor", "lowered", "--prefill-kv", "int8"),
}


def test_what_is_quantized_and_compiled_runs_and_is_verified(
    tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the promises of `kvc8-verify forms`: equal codes and tokens in doubles, in every form."""
    directory, outs = tmp_path / "c8", {name: str(tmp_path / name) for name in FORMS}
    quantize_model(tiny_model("llama", num_hidden_layers=1, head_dim=32), directory, "all")
    for name, (target, *options) in FORMS.items():
        given = [str(directory), "--target", target, "-o", outs[name], *options]
        assert entry(compiler.parser(), compiler.work, given) == 0
        capsys.readouterr()
        generated = [outs[name], "--prompt", "hello", "--max-new-tokens", "4", "--json"]
        assert run.main(generated) == 0
        [sequence] = json.loads(capsys.readouterr().out)["sequences"]
        assert len(sequence["tokens"]) == 4
    given = ["forms", str(directory), *outs.values(), "--tokens", "12", "--steps", "2"]
    assert entry(verify.parser(), verify.work, given) == 0
