"""Weights files: where tensors lie, what an index says of them, and what reading them costs."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.checkpoint.safetensors_files import SMALL
from kvc8.ir.errors import ModelError

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
LINEAR = {  # of a W8A8 linear with `rows` outputs and 8192 inputs
    "weight": ("I8", 8192),
    "weight_scale": ("F16", 2),
    "weight_offset": ("F16", 2),
    "quant_bias": ("I32", 4),
    "deq_scale": ("I64", 8),
}


def shards(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """Write `tensors` in two files, and their index, which is returned."""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return index


def hollow_shard(path: Path, layer: int) -> list[str]:
    """Write a layer's attention as llama-70b has it, with a hole for data: it takes no disk."""
    header: dict[str, object] = {}
    end = 0
    for module, rows in {"q": 8192, "k": 1024, "v": 1024, "o": 8192}.items():
        prefix = f"model.layers.{layer}.self_attn.{module}_proj"
        for part, (dtype, size) in LINEAR.items():
            column = {"weight": [8192], "weight_scale": [1], "weight_offset": [1]}.get(part, [])
            span = [end, end + rows * size]
            entry = {"dtype": dtype, "shape": [rows, *column], "data_offsets": span}
            header[f"{prefix}.{part}"] = entry
            end = span[1]
        for part in ("input_scale", "input_offset"):
            header[f"{prefix}.{part}"] = {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": [end, end + 4],
            }
            end += 4
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return list(header)


def test_a_tensor_reads_as_safetensors_reads_it_and_lies_where_it_says() -> None:
    checkpoint = open_checkpoint(GOLDEN / "qwen2_fp16_none_asym" / "quant")
    for name, tensor in checkpoint.tensors.items():
        value = checkpoint.read(name)
        with safe_open(tensor.file, framework="pt") as file:
            assert torch.equal(value, file.get_tensor(name))
        assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype)
        data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == bytes(value.contiguous().view(torch.uint8).numpy().tobytes())


def test_reading_maps_and_does_not_copy(tmp_path: Path) -> None:
    shards(tmp_path, {"big": torch.zeros(SMALL // 4 + 1), "small": torch.zeros(SMALL // 4)})
    checkpoint = open_checkpoint(tmp_path)
    first, second = checkpoint.read("big"), checkpoint.read("big")
    assert first.data_ptr() == second.data_ptr()
    assert checkpoint.read("small").data_ptr() != checkpoint.read("small").data_ptr()


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    shards(tmp_path, {"a": torch.ones(4)})
    checkpoint = open_checkpoint(tmp_path)
    file = checkpoint.tensors["a"].file
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ModelError) as caught:
        checkpoint.read("a")
    assert str(caught.value) == f"{file}: has become shorter; copy the file again"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sharded_float_model_opens(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"w{i}.weight": torch.full((3,), float(i), dtype=dtype) for i in range(5)}
    shards(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_a_tensor_that_the_index_leaves_out_is_reported(tmp_path: Path) -> None:
    tensors = {f"w{i}.weight": torch.zeros(3) for i in range(4)}
    index = shards(tmp_path, tensors)
    whole = json.loads(index.read_text())
    del whole["weight_map"]["w2.weight"]
    index.write_text(json.dumps(whole))
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.tensors) == ["w0.weight", "w1.weight", "w3.weight"]
    assert tuple(map(str, checkpoint.warnings)) == (
        f"{index}: leaves out w2.weight of its shards; kvc8 leaves it out too",
    )


def test_a_snapshot_in_hugging_faces_cache_opens(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "4567").write_text("{}")
    save_file({"w.weight": torch.ones(2)}, blobs / "0123")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    (tmp_path / "link").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "link"):
        assert torch.equal(open_checkpoint(directory).read("w.weight"), torch.ones(2))


def test_a_70b_directory_opens_at_once_without_its_weights(tmp_path: Path) -> None:
    weight_map: dict[str, str] = {}
    for layer in range(80):
        file = f"quant_model_weight_w8a8-{layer + 1:05}-of-00080.safetensors"
        weight_map |= dict.fromkeys(hollow_shard(tmp_path / file, layer), file)
    index = tmp_path / "quant_model_weight_w8a8.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    labels = dict.fromkeys(weight_map, "W8A8")
    (tmp_path / "quant_model_description.json").write_text(json.dumps(labels))
    (tmp_path / "config.json").write_text("{}")

    tracemalloc.start()
    start = time.process_time()
    checkpoint = open_checkpoint(tmp_path)
    took = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(checkpoint.w8a8) == 320
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) > 12e9
    assert took < 1.0
    assert peak < 8e6
