"""What an ONNX directory holds: a valid model, sizes by name, and weights where they were."""

import json
import shutil
import struct

import onnx
import pytest
import torch
from support.onnx_models import KINDS, QUANTIZED, both, compiled
from support.sparse import LLAMA_70B, write_sparse

from kvc8.backends.onnx import weights
from kvc8.ir.text import parse
from kvc8.tools.benchmarks.measured import measured

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


def test_only_the_pages_that_are_read_are_dequantized(emitted):
    out = emitted(QUANTIZED[0]).out
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    read = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(read) == 8  # K and V of four layers
    for node in read:
        flat = makers[node.input[0]]
        assert makers[makers[flat.input[0]].input[0]].op_type == "Gather"


@pytest.mark.parametrize("model", [*KINDS, *QUANTIZED])
def test_the_model_is_valid_and_of_standard_ops_and_names_its_sizes(model, emitted, tmp_path):
    shutil.copytree(emitted(model).out, tmp_path / "copy")  # the checker refuses hard links
    onnx.checker.check_model(tmp_path / "copy" / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "copy" / "model.onnx")
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    shapes = {
        port.name: [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        for port in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == ["T"]
    assert shapes["query_starts"] == ["B + 1"]
    assert shapes["block_table"] == ["B", "M"]
    assert shapes["logits"][0] == "R"
    assert shapes["k_cache_0_new"] == shapes["k_cache_0"]
    assert shapes["k_cache_0"][:2] == ["N", "S"]


def test_weights_are_linked_and_not_copied(emitted):
    model = emitted("llama")
    shard = model.out / "weights" / "model.safetensors"
    assert shard.samefile(model.directory / "model.safetensors")
    own = {p.name: p.stat().st_size for p in model.out.iterdir() if p.is_file()}
    assert own["derived.bin"] < 1024  # the rotary frequencies
    assert own["model.onnx"] < shard.stat().st_size / 5
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= own.keys()
    manifest = json.loads((model.out / "manifest.json").read_text())
    assert manifest["inputs"][0] == {"name": "input_ids", "dtype": "i64", "shape": ["T"]}
    assert [port["name"] for port in manifest["outputs"]][:2] == ["logits", "k_cache_0_new"]


RECIPES = [
    "f32[6, 8] = stored('rows')",
    "f32[6, 8] = cast(stored('half'), f32)",
    "f32[6, 8] = cast(stored('bf16'), f32)",
    "f32[8, 6] = transpose(stored('rows'), 0, 1)",
    "f32[6, 2, 4] = transpose(reshape(cast(stored('half'), f32), [6, 4, 2]), 1, 2)",
    "f32[2, 8] = slice(stored('rows'), 0, 3, 5)",
    "f32[12, 8] = concat([stored('rows'), neg(cast(stored('bf16'), f32))], 0)",
    "f32[6] = reciprocal(stored('scale'))",
    "f32[2, 6] = expand(float_bits(stored('deq_bits')), [2, 6])",
    "f32[3] = values([1.0, 2.5, -3.0], f32)",
    "f32[6, 8] = w8a8(stored('w8'), stored('in_scale'), stored('in_offset'), stored('scale'), "
    "stored('bias'))",
    "f32[6] = cast(w8a8_bias(stored('w8'), stored('in_scale'), stored('in_offset'), "
    "stored('scale'), stored('bias')), f32)",
]


@pytest.mark.parametrize("small", [0, weights.SMALL])
@pytest.mark.parametrize("expression", RECIPES)
def test_expressions_are_exact_as_nodes_and_as_derived_tensors(
    expression, small, stored, tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "SMALL", small)
    type_ = expression.partition(" = ")[0]
    text = f"def captured(x: f32[1], w: {expression}):\n    y: {type_} = aten.mul.Tensor(w, x)\n"
    [want], [got] = both(text + "    return [y]", stored, tmp_path / "out", {"x": torch.ones(1)})
    assert torch.equal(want, got)


def test_weights_beyond_two_gigabytes(tmp_path):
    """A shard of zeros that is a hole but for its last tensor."""
    directory, last = tmp_path / "model", torch.arange(8.0)
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    size = 5 << 29
    entries = {
        "big": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]},
        "last": {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]},
    }
    header = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size, 1)
        file.write(last.numpy().tobytes())
    text = """
    def captured(x: i64[8], big: i8[2684354560] = stored("big"), last: f32[8] = stored("last")):
        rows: i8[8] = aten.index.Tensor(big, [x])
        to: f32[8] = aten.to.dtype(rows, f32)
        out: f32[8] = aten.add.Tensor(to, last)
        return [out]
    """
    session = compiled(parse(text), directory, tmp_path / "out")
    [got] = session.run({"x": torch.arange(8) * (size // 8)})
    assert torch.equal(got, last)


def test_a_model_of_70b_is_exported_within_its_memory(tmp_path):
    """Of a checkpoint that has headers and no data: 1.5 GB."""
    model, out = write_sparse(tmp_path / "model", LLAMA_70B), tmp_path / "out"
    done = measured(tmp_path, "kvc8.tools.compile", model, "--target", "onnx", "-o", out)
    assert done.status == 0
    assert done.peak < 1500
    assert (out / "model.onnx").stat().st_size < 5e6
