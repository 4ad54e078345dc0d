"""Every program of every kind of model, at every stage, reads back from its own text."""

from pathlib import Path

import pytest
from support.sparse import LLAMA_70B, write_sparse

from kvc8.ir.shapes import Shapes
from kvc8.ir.text import parse, show
from kvc8.tools import command
from kvc8.tools import compile as compile_tool
from kvc8.tools import quantize as quantize_tool

pytestmark = pytest.mark.slow

TEXTS = Path(__file__).parent / "data" / "calibration.jsonl"
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"


def dumped(directory: Path, folder: Path) -> list[Path]:
    """The texts of a compile, before the first pass and after each; it may stop at a limit."""
    options = [str(directory), "--target", "npu", "-o", str(folder / "out"), "--dtype", "float16"]
    parser = compile_tool.parser()
    command.entry(parser, compile_tool.work, [*options, "--dump", str(folder / "dump")])
    return sorted((folder / "dump").rglob("*.py"))


def check(paths: list[Path], stages: int) -> None:
    assert len(paths) >= stages
    shapes = Shapes()
    for path in paths:
        text = path.read_text().removesuffix("\n")
        assert show(parse(text, shapes)) == text, path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_tiny_models(tiny_model, tmp_path, kind):
    """Two layers: one of each kind there is."""
    quantized = tmp_path / "quantized"
    mixed = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3" else {}
    source = tiny_model(kind, num_hidden_layers=2, **mixed)
    options = [str(source), "-o", str(quantized), "--calib-file", str(TEXTS)]
    more = ["--samples", "2", "--use-kvcache-quant", "--recipe", "minmax"]
    parser = quantize_tool.parser()
    assert command.entry(parser, quantize_tool.work, [*options, *more]) == 0
    check(dumped(quantized, tmp_path), stages=20)


def test_what_msmodelslim_wrote(tmp_path):
    """Zero points beside scales."""
    check(dumped(CHECKPOINTS / "qwen2_fp16_none_asym" / "quant", tmp_path), stages=20)


def test_a_70b_model(tmp_path):
    """Its 80 layers are alike in text, so three stand for them, in every stage."""
    config = {**LLAMA_70B, "num_hidden_layers": 3}
    check(dumped(write_sparse(tmp_path / "llama70b", config), tmp_path), stages=20)
