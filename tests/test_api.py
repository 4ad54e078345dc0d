"""kvc8 from Python: what a script calls instead of the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.notes import of_float32

import kvc8
from kvc8.backends.onnx.model import OnnxModel
from kvc8.ir.errors import TargetError
from kvc8.passes.options import Options
from kvc8.tools import command, quantize
from kvc8.tools.quantizer.settings import Settings

LLAMA = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
HEAVY = ("torch", "torch_npu", "onnx", "onnxruntime", "matplotlib", "transformers")


def test_importing_kvc8_imports_nothing_heavy():
    code = f"import json, sys, kvc8; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(made.stdout) == []


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(TargetError) as refused:
        kvc8.compile(LLAMA, target="npu", out=tmp_path / "out", flavor="gqa")
    sentence = "--flavor: is of --target onnx; leave it out, or compile for onnx"
    assert str(refused.value) == sentence


@pytest.mark.slow
def test_a_model_is_compiled_loaded_and_asked(tmp_path):
    """The same tokens come out of the emulated NPU and of ONNX Runtime: int8 by other code."""
    options = Options(prefill_kv="int8", fuse="off")
    compiled = kvc8.compile(LLAMA, target="npu", out=tmp_path / "npu", options=options)
    assert compiled.layout.bytes_per_token * 2 == compiled.layout.float16_bytes_per_token
    assert set(compiled.phases) == {"prefill", "chunk", "decode"}
    kvc8.compile(LLAMA, target="onnx", flavor="lowered", out=tmp_path / "onnx", options=options)
    emulated, onnx = (
        kvc8.load(tmp_path / name).generate(["the cache"], max_new_tokens=4, chat=False)
        for name in ("npu", "onnx")
    )
    assert len(emulated[0].tokens) == 4
    assert (emulated[0].prompt, emulated[0].finish) == (onnx[0].prompt, "length")
    assert kvc8.verify(LLAMA, tmp_path / "npu", tokens=8, steps=2).problems == []
    assert isinstance(kvc8.load(tmp_path / "onnx").allocate([4], None), OnnxModel)


@pytest.mark.slow
def test_a_model_is_quantized_as_the_command_does(tiny_model, tmp_path):
    """The same bytes, and the notes that the command prints."""
    model, texts = tiny_model("llama", num_hidden_layers=1), tmp_path / "texts.txt"
    texts.write_text("The sea is a very large thing.\n\n12 + 30 = 42\n")
    settings = Settings(recipe="minmax", disable=("*.q_proj",))
    made = kvc8.quantize(model, out=tmp_path / "a", calibration=texts, settings=settings)
    assert (made.recipe, made.texts, len(made.plan.linears), made.left_float) == ("minmax", 2, 3, 4)
    assert made.notes == (of_float32(model),)
    given = [str(model), "-o", str(tmp_path / "b"), "--calib-file", str(texts)]
    options = ["--recipe", "minmax", "--disable", "*.q_proj"]
    assert command.entry(quantize.parser(), quantize.work, [*given, *options]) == 0
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [[f.name for f in each] for each in files] == [[f.name for f in files[0]]] * 2
    for a, b in zip(*files, strict=True):
        assert a.read_bytes() == b.read_bytes()
