"""What a damaged model directory is told: one sentence, asserted whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelError

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
CONFIG, DESCRIPTION = "config.json", "quant_model_description.json"
WEIGHTS, INDEX = (
    "quant_model_weight_w8a8.safetensors",
    "quant_model_weight_w8a8.safetensors.index.json",
)
K1 = "model.layers.1.self_attn.k_proj"
Damage = Callable[[Path], object]


def edit(file: str, **changes: object) -> Damage:
    """Set names in a JSON file; None takes them out."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / file).read_text()) | changes
        kept = {name: v for name, v in value.items() if v is not None}
        (directory / file).write_text(json.dumps(kept))

    return damage


def put(file: str, text: str) -> Damage:
    return lambda directory: (directory / file).write_text(text)


def drop(file: str) -> Damage:
    return lambda directory: (directory / file).unlink()


def tensor(name: str, value: torch.Tensor | None, label: str | None = "same") -> Damage:
    """Replace a tensor, or take it out; and its label with it unless it stays the same."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS) | ({} if value is None else {name: value})
        if value is None:
            del tensors[name]
        (directory / WEIGHTS).unlink()  # it is mapped: not to be written over
        save_file(tensors, directory / WEIGHTS)
        if label != "same":
            edit(DESCRIPTION, **{name: label})(directory)

    return damage


def header(**changes: object) -> Damage:
    """Write a weights file with this header and eight bytes of data."""
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} | changes
    text = json.dumps({name: entry for name, entry in entries.items() if entry}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    return lambda directory: (directory / WEIGHTS).write_bytes(data)


def indexed(shard: object) -> Damage:
    """Add an index that names `shard`."""
    return put(INDEX, json.dumps({"weight_map": {"model.norm.weight": shard}}))


def outside(name: str) -> Damage:
    """Make `name` a link to a file beside the directory."""

    def damage(directory: Path) -> None:
        (directory / name).rename(directory.parent / "outside")
        (directory / name).symlink_to("../outside")

    return damage


def cut(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:-1000])


def shard_without_its_tensor(directory: Path) -> None:
    save_file({"other": torch.zeros(1)}, directory / "a.safetensors")
    indexed("a.safetensors")(directory)


BARE = (
    "which is not the bare name of a file in the directory; "
    "copy the file into the directory and name it without a path"
)
CASES: dict[str, tuple[Damage, str]] = {
    "no directory": (
        shutil.rmtree,
        "DIR: no such directory; check the path of the model",
    ),
    "no config": (
        drop(CONFIG),
        "DIR: has no config.json; name the directory of a Hugging Face model",
    ),
    "config is not JSON": (
        put(CONFIG, "{"),
        "DIR/config.json: is not JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); copy the file again",
    ),
    "config is not an object": (
        put(CONFIG, "[1]"),
        "DIR/config.json: holds an array and should hold a JSON object; copy the file again",
    ),
    "config says a thing twice": (
        put(CONFIG, '{"a": 1, "a": 2}'),
        "DIR/config.json: says 'a' twice; remove one of them",
    ),
    "config is a link that leaves the directory": (
        outside(CONFIG),
        "DIR/config.json: is a link that leaves the model directory; copy the file here",
    ),
    "no weights": (
        drop(WEIGHTS),
        "DIR: has no model.safetensors and no index; save the model as safetensors",
    ),
    "pickled weights": (
        lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"),
        "DIR: has no model.safetensors but pytorch_model.bin, which kvc8 does not run; "
        "save the model as safetensors",
    ),
    "shards without an index": (
        lambda d: shutil.copy(d / WEIGHTS, d / "quant_model_weight_2.safetensors"),
        "DIR: holds quant_model_weight_2.safetensors, quant_model_weight_w8a8.safetensors and no "
        "one file that says which to read; copy the index too, or remove what is not the model's",
    ),
    "no description": (
        lambda d: ((d / DESCRIPTION).unlink(), (d / WEIGHTS).rename(d / "model.safetensors")),
        "DIR: holds model.layers.0.mlp.gate_proj.deq_scale, model.layers.0.mlp.up_proj.deq_scale, "
        "model.layers.0.self_attn.k_proj.deq_scale, model.layers.0.self_attn.o_proj.deq_scale, "
        "model.layers.0.self_attn.q_proj.deq_scale and 59 more of a quantized model and no "
        "quant_model_description.json; copy that file too",
    ),
    "weights cut short": (
        cut,
        "DIR/WEIGHTS: is 3420168 bytes long and its header describes 3421168; copy the file again",
    ),
    "weights shorter than their header": (
        lambda d: (d / WEIGHTS).write_bytes(bytes(3)),
        "DIR/WEIGHTS: is 3 bytes long, too short for its own header; copy it again",
    ),
    "weights are a directory": (
        lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
        "DIR/WEIGHTS: is not a regular file; put the file itself there",
    ),
    "weights are a dangling link": (
        lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).symlink_to("gone")),
        "DIR/WEIGHTS: is a link to a file that is not there; copy the file here",
    ),
    "tensors overlap": (
        header(b={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}),
        "DIR/WEIGHTS: b overlaps a; copy the file again",
    ),
    "tensors leave a hole": (
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}),
        "DIR/WEIGHTS: a leaves a hole after the header; copy the file again",
    ),
    "a tensor lies beyond the file": (
        header(b={"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}),
        "DIR/WEIGHTS: is 139 bytes long and its header describes 143; copy the file again",
    ),
    "a tensor's bytes do not suit its shape": (
        header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
        "DIR/WEIGHTS: a takes 12 bytes and its header gives it those from 0 to 8; "
        "copy the file again",
    ),
    "a tensor's entry is damaged": (
        header(a={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}),
        "DIR/WEIGHTS: a has a damaged header entry; copy the file again",
    ),
    "a tensor's dtype is not known": (
        header(a={"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}),
        "DIR/WEIGHTS: a has dtype F4, which kvc8 does not read; save it as one of F64, F32, F16, "
        "BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U8, BOOL",
    ),
    "no tensors": (
        lambda d: (d / WEIGHTS).write_bytes(b"\2" + bytes(7) + b"{}"),
        "DIR/WEIGHTS: holds no tensors; copy the file again",
    ),
    "bytes beyond the last tensor": (
        header(a=None),
        "DIR/WEIGHTS: is 18 bytes long and its header describes 10; copy the file again",
    ),
    "index without a map": (
        put(INDEX, "{}"),
        "DIR/INDEX: has no weight_map; copy the file again",
    ),
    "index names no file": (
        indexed(3),
        "DIR/INDEX: gives model.norm.weight no file name; copy the file again",
    ),
    "index names a missing shard": (
        indexed("gone.safetensors"),
        "DIR/INDEX: names gone.safetensors, which is not there; copy that file too",
    ),
    "index leaves the directory": (indexed("../x"), f"DIR/INDEX: names '../x', {BARE}"),
    "index names an absolute path": (
        indexed("/etc/passwd"),
        f"DIR/INDEX: names '/etc/passwd', {BARE}",
    ),
    "index names a path inside": (indexed("sub/x"), f"DIR/INDEX: names 'sub/x', {BARE}"),
    "index names a link that leaves": (
        lambda d: (outside(WEIGHTS)(d), indexed(WEIGHTS)(d)),
        "DIR/WEIGHTS: is a link that leaves the model directory; copy the file here",
    ),
    "a shard lacks a tensor": (
        shard_without_its_tensor,
        "DIR/INDEX: says a.safetensors holds model.norm.weight, which it does not; "
        "copy the directory again",
    ),
    "a layer has no scale": (
        tensor(f"{K1}.kv_cache_scale", None, label=None),
        "DIR/DESCRIPTION: layer 1 has no k_proj.kv_cache_scale; "
        "calibrate the KV cache of every layer",
    ),
    "a layer too many": (
        edit(CONFIG, num_hidden_layers=3),
        "DIR/DESCRIPTION: has model.layers.3.self_attn.k_proj.kv_cache_offset, "
        "model.layers.3.self_attn.k_proj.kv_cache_scale, "
        "model.layers.3.self_attn.v_proj.kv_cache_offset, "
        "model.layers.3.self_attn.v_proj.kv_cache_scale and config.json says 3 layers; "
        "correct num_hidden_layers there",
    ),
    "a scale is too short": (
        tensor(f"{K1}.kv_cache_scale", torch.ones(32, dtype=torch.float16)),
        f"DIR/WEIGHTS: {K1}.kv_cache_scale has shape [32] and config.json asks for [64]; "
        "check that both belong to the same model",
    ),
    "the config is of another model": (
        edit(CONFIG, num_key_value_heads=8),
        "DIR/WEIGHTS: model.layers.0.self_attn.k_proj.kv_cache_scale has shape [64] and "
        "config.json asks for [256]; check that both belong to the same model",
    ),
    "a scale is of a wrong dtype": (
        tensor(f"{K1}.kv_cache_scale", torch.ones(64, dtype=torch.int8)),
        f"DIR/WEIGHTS: {K1}.kv_cache_scale is int8 and should be float16 or bfloat16 or float32; "
        "quantize the model again",
    ),
    "a layer count is absurd": (
        edit(CONFIG, num_hidden_layers=-1),
        "DIR/config.json: num_hidden_layers is -1 and should be a positive number; "
        "correct it from the model's original config.json",
    ),
    "a described tensor is missing": (
        tensor(f"{K1}.deq_scale", None),
        f"DIR/DESCRIPTION: labels {K1}.deq_scale W8A8 and no weights file holds it; "
        "copy the directory again",
    ),
    "a linear is not whole": (
        tensor(f"{K1}.deq_scale", None, label=None),
        f"DIR/DESCRIPTION: {K1} is W8A8 and has no deq_scale; quantize the model again",
    ),
    "a linear's tensor is of a wrong dtype": (
        tensor(f"{K1}.deq_scale", torch.ones(64, dtype=torch.float16)),
        f"DIR/WEIGHTS: {K1}.deq_scale is float16 and should be int64 or float32; "
        "quantize the model again",
    ),
    "a linear's tensor is of a wrong shape": (
        tensor(f"{K1}.quant_bias", torch.ones(63, dtype=torch.int32)),
        f"DIR/WEIGHTS: {K1}.quant_bias has shape [63] and its weight [64, 256] asks for [64]; "
        "check that both belong to the same model",
    ),
    "a float label on an int8 weight": (
        edit(DESCRIPTION, **{"model.layers.0.mlp.up_proj.weight": "FLOAT"}),
        "DIR/WEIGHTS: model.layers.0.mlp.up_proj.weight is int8 and should be "
        "float16 or bfloat16 or float32; quantize the model again",
    ),
    "no label on an int8 weight": (
        edit(DESCRIPTION, **{f"{K1}.weight": None}),
        f"DIR/DESCRIPTION: has no label for {K1}.weight, which is not floating point; "
        "copy the description that belongs to these weights",
    ),
    "a label that kvc8 does not read": (
        edit(DESCRIPTION, **{f"{K1}.weight": "W4A8_DYNAMIC"}),
        f"DIR/DESCRIPTION: labels {K1}.weight W4A8_DYNAMIC, which kvc8 does not read; "
        "quantize the model to W8A8 with C8",
    ),
    "two labels of one linear": (
        edit(DESCRIPTION, **{f"{K1}.weight": "W8A8_DYNAMIC"}),
        f"DIR/DESCRIPTION: labels tensors of {K1} W8A8_DYNAMIC, W8A8; quantize the model again",
    ),
    "a dynamic linear of a static one's parts": (
        edit(DESCRIPTION, **{f"{K1}.input_scale": "W8A8_DYNAMIC"}),
        f"DIR/DESCRIPTION: labels {K1}.input_scale W8A8_DYNAMIC, which such a tensor cannot be; "
        "quantize the model again",
    ),
    "rotations at run time": (
        edit(DESCRIPTION, metadata={"quarot": {"max_tp_size": 4}}),
        "DIR/DESCRIPTION: says that values are rotated at run time, which kvc8 does not do; "
        "quantize the model with offline rotations only",
    ),
    "a label that cannot be": (
        edit(DESCRIPTION, **{f"{K1}.weight": "C8"}),
        f"DIR/DESCRIPTION: labels {K1}.weight C8, which such a tensor cannot be; "
        "quantize the model again",
    ),
    "a setting that kvc8 does not read": (
        edit(DESCRIPTION, fa_quant_type="FAKQuant"),
        "DIR/DESCRIPTION: fa_quant_type is FAKQuant, which kvc8 does not read; "
        "quantize the model to W8A8 with C8, per channel",
    ),
    "another KV type": (
        edit(CONFIG, quantization_config={"kv_quant_type": "C4"}),
        "DIR/config.json: kv_quant_type is C4, which kvc8 does not read; "
        "quantize the model to W8A8 with C8, per channel",
    ),
    "a record that is not one": (
        edit(DESCRIPTION, kvc8={"kv_calibrated": "mid-rope"}),
        "DIR/DESCRIPTION: kv_calibrated is mid-rope; it should be pre-rope or post-rope",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_directory_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    damage, sentence = CASES[case]
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN, directory)
    damage(directory)
    for short, name in {"WEIGHTS": WEIGHTS, "INDEX": INDEX, "DESCRIPTION": DESCRIPTION}.items():
        sentence = sentence.replace(f"DIR/{short}", f"{directory}/{name}")
    with pytest.raises(ModelError) as raised:
        open_checkpoint(directory)
    assert str(raised.value) == sentence.replace("DIR", str(directory))


QUANTIZATION = {
    "another method": (
        {"quant_method": "gptq"},
        "config.json: quantization_config has quant_method gptq, which kvc8 does not read; "
        "take the float model and quantize it with kvc8-quantize",
    ),
    "not an object": (
        3,
        "config.json: quantization_config is 3 and should be an object; copy the file again",
    ),
    "C8 without scales": (
        {"kv_quant_type": "C8"},
        "config.json: kv_quant_type is C8 and the model has no KV scales; "
        "copy its quant_model_description.json too, or remove kv_quant_type",
    ),
    "quantized linears": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
        "config.json: config_groups quantizes linears in a way that kvc8 does not read; "
        "take the float model and quantize it with kvc8-quantize",
    ),
    "a float KV cache": (
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        "config.json: kv_cache_scheme has type float and kvc8 reads int; "
        "calibrate a static int8 KV cache",
    ),
}


@pytest.mark.parametrize("case", QUANTIZATION)
def test_another_quantization_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    settings, sentence = QUANTIZATION[case]
    (tmp_path / CONFIG).write_text(json.dumps({"quantization_config": settings}))
    save_file({"w.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as raised:
        open_checkpoint(tmp_path)
    assert str(raised.value) == f"{tmp_path}/{sentence}"


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ModelError) as raised:
        checkpoint.read("x")
    assert str(raised.value) == f"{tmp_path}: has no tensor x; check the model's type"
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r": model\.norm\.weight cannot be read .*; copy the file"):
        checkpoint.read("model.norm.weight")
