"""The same input gives the same bytes, whatever order a process keeps its sets in.

That order follows from PYTHONHASHSEED and from where objects lie; both differ between processes.
"""

import fnmatch
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from kvc8.tools import command, quantize
from kvc8.tools import compile as compiler

pytestmark = pytest.mark.slow

TEXTS = ("The sea is a very large thing.", "12 + 30 = 42", "def f(x): return x")


def everything(model: str) -> None:
    """Quantize a model and compile it for every target, here, with all that can be written."""
    Path("texts.txt").write_text("\n".join(TEXTS))
    given = [model, "-o", "c8", "--calib-file", "texts.txt", "--positions", "64"]
    assert command.entry(quantize.parser(), quantize.work, given) == 0
    compile_(
        "npu", "--target", "npu", "--dtype", "float16", "--dump", "npu-dump", "--json", *page("npu")
    )
    compile_("standard", "--target", "onnx", *page("standard"))
    compile_("gqa", "--target", "onnx", "--flavor", "gqa")
    compile_("lowered", "--target", "onnx", "--flavor", "lowered")


def page(out: str) -> list[str]:
    return ["--report", f"{out}.html"]


def compile_(out: str, *options: str) -> None:
    with Path(f"{out}.said").open("w") as said, redirect_stdout(said):
        given = ["c8", "-o", out, *options]
        assert command.entry(compiler.parser(), compiler.work, given) == 0


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_two_processes_write_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    model = str(tiny_model("qwen3", num_hidden_layers=2))
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    code = f"import test_same_bytes; test_same_bytes.everything({model!r})"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
    monkeypatch.chdir(here)
    with subprocess.Popen([sys.executable, "-c", code], cwd=there, env=environment) as other:
        everything(model)
    assert other.returncode == 0
    first, second = files(here), files(there)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    for name in (
        "c8/config.json",
        "npu/manifest.json",
        "npu.said",
        "npu.html",
        "standard.html",
        "npu-dump/decode/*-lower_paged_attention",
    ):
        assert fnmatch.filter(first, f"{name}*"), name
