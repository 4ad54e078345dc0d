"""Every layout of a model directory opens, and each of its tensors and labels has its place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvc8.ir.checkpoint.reader import Checkpoint, KVScale, LinearQuant, kv_widths, open_checkpoint
from kvc8.ir.errors import ModelError

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
CONFIG: dict[str, object] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDTH = 4
ATTENTION = "model.layers.{}.self_attn"
HEADER = {"model_quant_type": "W8A8", "kv_cache_type": "C8", "kv_quant_type": "C8"}
INDEX = "quant_model_weight_w8a8.safetensors.index.json"


def kv_part(prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    scale = torch.full((WIDTH,), 0.5, dtype=dtype)
    return {f"{prefix}.kv_cache_scale": scale, f"{prefix}.kv_cache_offset": torch.zeros_like(scale)}


def linear(prefix: str, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    packed = dtype == torch.float16
    return {
        f"{prefix}.weight": torch.zeros(rows, 8, dtype=torch.int8),
        f"{prefix}.weight_scale": torch.ones(rows, 1, dtype=dtype),
        f"{prefix}.weight_offset": torch.zeros(rows, 1, dtype=dtype),
        f"{prefix}.input_scale": torch.ones(1),
        f"{prefix}.input_offset": torch.zeros(1),
        f"{prefix}.quant_bias": torch.zeros(rows, dtype=torch.int32),
        f"{prefix}.deq_scale": torch.ones(rows, dtype=torch.int64 if packed else torch.float32),
    }


def quantized(dtype: torch.dtype = torch.float16) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors of a two-layer W8A8+C8 model, and their description."""
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for side in "kv":
            prefix = f"{ATTENTION.format(layer)}.{side}_proj"
            tensors |= kv_part(prefix, dtype) | linear(prefix, WIDTH, dtype)
    labels: dict[str, object] = {name: "C8" if ".kv_" in name else "W8A8" for name in tensors}
    tensors |= {"model.norm.weight": torch.ones(8, dtype=dtype), "model.norm.bias": torch.zeros(8)}
    labels |= {"model.norm.weight": "FLOAT", "model.norm.bias": "FLOAT"}
    return tensors, HEADER | labels


def write(
    directory: Path,
    tensors: dict[str, Tensor],
    description: dict[str, object] | None = None,
    config: dict[str, object] = CONFIG,
    weights: str = "quant_model_weight_w8a8.safetensors",
) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if description is not None:
        (directory / "quant_model_description.json").write_text(json.dumps(description))
    save_file(tensors, directory / weights)
    return directory


def shards(directory: Path, tensors: dict[str, Tensor], index: str) -> None:
    """Write `tensors` in two files and an index."""
    names, stem = sorted(tensors), index.removesuffix(".safetensors.index.json")
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    whole = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / index).write_text(json.dumps(whole))


def placed(checkpoint: Checkpoint) -> list[str]:
    """The tensors that a W8A8 linear or a KV scale names, each as often as it is named."""
    linears = (linear.tensors.values() for linear in checkpoint.w8a8.values())
    scales = ((s.scale, s.offset) for pair in checkpoint.kv.values() for s in pair)
    return [name for group in (*linears, *scales) for name in group if name is not None]


@pytest.mark.parametrize(
    ("name", "layout", "calibrated"),
    [
        ("llama_fp16_m3", "ascendV1", "pre-rope"),
        ("qwen2_fp16_none_asym", "ascendV1", "pre-rope"),
        ("llama_fp16_m3_mindie_safe_tensor", "safe_tensor", "pre-rope"),
        ("v1_qwen2_fp16_w8a8c8", "msmodelslim-v1", "post-rope"),
    ],
)
def test_what_msmodelslim_wrote_opens_and_is_accounted_for(
    name: str, layout: str, calibrated: str
) -> None:
    directory = GOLDEN / name / "quant"
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.layout, checkpoint.kv_calibrated) == (layout, calibrated)
    assert checkpoint.warnings == ()
    assert sorted(checkpoint.kv) == [0, 1, 2, 3]
    assert len(checkpoint.w8a8) == 4 * 6  # all but down_proj

    (weights,) = directory.glob("*.safetensors")
    (description,) = directory.glob("quant_model_description*.json")
    labels = json.loads(description.read_text())
    assert set(checkpoint.tensors) == set(load_file(weights))
    assert set(checkpoint.tensors) == {n for n, label in labels.items() if n.count(".") > 0}
    quantized = {n for n, label in labels.items() if label in ("W8A8", "C8") and "." in n}
    biases = {linear.bias for linear in checkpoint.w8a8.values()} - {None}
    copies = {n for n in quantized if ".module." in n}
    assert len(placed(checkpoint)) == len(set(placed(checkpoint)))
    assert set(placed(checkpoint)) == (quantized - copies) | biases
    assert bool(copies) == (layout == "safe_tensor")
    assert bool(biases) == ("qwen2" in name)


@pytest.mark.parametrize("name", ["llama_fp16_m3", "qwen2_fp16_none_asym"])
def test_a_float_model_opens(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name / "orig")
    assert (checkpoint.layout, checkpoint.kv_calibrated) == ("float", None)
    assert (dict(checkpoint.w8a8), dict(checkpoint.kv), checkpoint.warnings) == ({}, {}, ())


def test_a_sharded_quantized_model_is_the_same_as_a_whole_one(tmp_path: Path) -> None:
    tensors, description = quantized()
    whole = open_checkpoint(write(tmp_path / "whole", tensors, description))
    directory = write(tmp_path / "sharded", tensors, description)
    (directory / "quant_model_weight_w8a8.safetensors").unlink()
    shards(directory, tensors, INDEX)
    sharded = open_checkpoint(directory)
    assert (sharded.w8a8, sharded.kv, sharded.layout) == (whole.w8a8, whole.kv, "ascendV1")
    assert sharded.warnings == whole.warnings == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_each_dtype_open(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(write(tmp_path, *quantized(dtype)))
    prefix = ATTENTION.format(1)
    assert checkpoint.kv[1] == tuple(
        KVScale(
            f"{prefix}.{s}_proj.kv_cache_scale", f"{prefix}.{s}_proj.kv_cache_offset", "channel"
        )
        for s in "kv"
    )
    k = f"{prefix}.k_proj."
    _, *parts, _ = LinearQuant.__dataclass_fields__
    want = LinearQuant("static", *(k + part for part in parts), None)
    assert checkpoint.w8a8[f"{prefix}.k_proj"] == want


def test_c8_without_w8a8_opens_with_a_warning(tmp_path: Path) -> None:
    tensors, labels = quantized()
    tensors = {n: t for n, t in tensors.items() if ".kv_" in n or "norm" in n}
    labels = {n: v for n, v in labels.items() if n in tensors} | HEADER
    checkpoint = open_checkpoint(write(tmp_path, tensors, labels))
    assert (len(checkpoint.kv), len(checkpoint.w8a8)) == (2, 0)
    assert tuple(map(str, checkpoint.warnings)) == (
        f"{tmp_path}/quant_model_description.json: the vendor does not support C8 without W8A8; "
        "add W8A8 with kvc8-quantize to run this on the vendor's own stack",
    )


def test_the_labels_of_the_vendors_page_are_read(tmp_path: Path) -> None:
    tensors, labels = quantized()
    expected = open_checkpoint(write(tmp_path / "tool", tensors, labels))
    labels = {n: "W8A8" if ".kv_" in n else v for n, v in labels.items()}
    del labels["kv_quant_type"]
    config = CONFIG | {"quantization_config": {"kv_quant_type": "C8"}, "quantize": "w8a8"}
    checkpoint = open_checkpoint(write(tmp_path / "page", tensors, labels, config))
    assert (checkpoint.kv, checkpoint.w8a8) == (expected.kv, expected.w8a8)
    assert checkpoint.warnings == ()


def test_a_layer_rolled_back_to_float_keeps_its_kv_scales(tmp_path: Path) -> None:
    tensors, labels = quantized()
    back = [n for n in tensors if n.startswith("model.layers.1.") and ".kv_" not in n]
    for name in back:
        del tensors[name], labels[name]
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name], labels[name] = torch.zeros(WIDTH, 8), "FLOAT"
    checkpoint = open_checkpoint(write(tmp_path, tensors, labels))
    assert sorted(checkpoint.w8a8) == [f"{ATTENTION.format(0)}.{s}_proj" for s in "kv"]
    assert sorted(checkpoint.kv) == [0, 1]


@pytest.mark.parametrize("nested", [False, True])
def test_the_label_of_an_lm_head_tied_to_the_embedding_needs_no_tensor(
    tmp_path: Path, nested: bool
) -> None:
    tensors, labels = quantized()
    expected = open_checkpoint(write(tmp_path / "without", tensors, labels))
    tied: dict[str, object] = {**CONFIG, "tie_word_embeddings": True}
    labels["lm_head.weight"] = "FLOAT"
    config = {"text_config": tied} if nested else tied
    checkpoint = open_checkpoint(write(tmp_path / "with", tensors, labels, config))
    assert (checkpoint.kv, checkpoint.w8a8, checkpoint.warnings) == (
        expected.kv,
        expected.w8a8,
        (),
    )


@pytest.mark.parametrize(("tied", "label"), [(False, "FLOAT"), (True, "W8A8")])
def test_any_other_lm_head_needs_its_tensor(tmp_path: Path, tied: bool, label: str) -> None:
    tensors, labels = quantized()
    labels["lm_head.weight"] = label
    write(tmp_path, tensors, labels, {**CONFIG, "tie_word_embeddings": tied})
    with pytest.raises(ModelError) as raised:
        open_checkpoint(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/quant_model_description.json: labels lm_head.weight {label} and no weights "
        "file holds it; copy the directory again"
    )


def test_scales_below_a_fused_linear_are_found(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for side in "kv":
            fused = f"transformer.h.{layer}.attn.c_attn"
            tensors |= kv_part(f"{fused}.{side}_proj", torch.float16)
            tensors |= linear(fused, 16, torch.float16)
    labels = {n: "C8" if ".kv_" in n else "W8A8" for n in tensors}
    checkpoint = open_checkpoint(write(tmp_path, tensors, HEADER | labels))
    assert checkpoint.kv[1][0].scale == "transformer.h.1.attn.c_attn.k_proj.kv_cache_scale"
    assert sorted(checkpoint.w8a8) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


def test_what_kvc8_quantize_recorded_overrules_the_layout(tmp_path: Path) -> None:
    tensors, labels = quantized()
    record = {"kv_calibrated": "post-rope", "texts": 12}
    checkpoint = open_checkpoint(write(tmp_path, tensors, labels | {"kvc8": record}))
    assert (checkpoint.layout, checkpoint.kv_calibrated) == ("ascendV1", "post-rope")
    assert (checkpoint.kvc8, checkpoint.warnings) == (record, ())


SCHEME = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_compressed_tensors_kv_cache_opens(tmp_path: Path, symmetric: bool) -> None:
    names = [f"{ATTENTION.format(i)}.{s}" for i in range(2) for s in "kv"]
    tensors = {f"{name}_scale": torch.full((1,), 0.5) for name in names}
    if not symmetric:
        tensors |= {f"{name}_zero_point": torch.ones(1, dtype=torch.int8) for name in names}
    tensors["model.norm.weight"] = torch.ones(8)
    settings = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}
    config = CONFIG | {"quantization_config": settings | {"config_groups": {}}}
    checkpoint = open_checkpoint(write(tmp_path, tensors, None, config, "model.safetensors"))
    assert (checkpoint.layout, checkpoint.kv_calibrated) == ("compressed-tensors", "post-rope")
    offset = None if symmetric else f"{names[3]}_zero_point"
    assert checkpoint.kv[1][1] == KVScale(f"{names[3]}_scale", offset, "tensor")
    assert checkpoint.warnings == ()


def test_what_is_not_known_is_reported_by_name(tmp_path: Path) -> None:
    tensors, labels = quantized()
    tensors["model.extra"] = torch.zeros(1)
    write(tmp_path, tensors, labels | {"colour": "blue", "metadata": {"by": "x"}})
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    description = f"{tmp_path}/quant_model_description.json"
    assert tuple(map(str, open_checkpoint(tmp_path).warnings)) == (
        f"{tmp_path}: model.safetensors is not read; check that it is not needed",
        f"{description}: says colour, metadata, which kvc8 does not know and leaves out; "
        "check what wrote it",
        f"{description}: has no label for model.extra; kvc8 takes it as FLOAT, check that it is",
    )


def test_scales_that_nothing_turns_on_are_reported(tmp_path: Path) -> None:
    tensors, labels = quantized()
    del labels["kv_cache_type"], labels["kv_quant_type"]
    checkpoint = open_checkpoint(write(tmp_path, tensors, labels))
    assert len(checkpoint.kv) == 2
    assert tuple(map(str, checkpoint.warnings)) == (
        f"{tmp_path}/quant_model_description.json: holds KV scales and neither it nor config.json "
        "says C8; add kv_quant_type C8 for the vendor's own stack to use them",
    )


def test_widths_come_from_the_config() -> None:
    assert kv_widths(CONFIG, "c") == (4, 4)
    assert kv_widths(CONFIG | {"head_dim": 32}, "c") == (64, 64)
    assert kv_widths(CONFIG | {"head_dim": None, "num_key_value_heads": None}, "c") == (8, 8)
    assert kv_widths(CONFIG | {"num_key_value_heads": [1, 2]}, "c") == (2, 4)
    assert kv_widths({"text_config": CONFIG, "num_hidden_layers": 9}, "c") == (4, 4)
    with pytest.raises(ModelError, match=r"^c: num_hidden_layers is null and should be a positive"):
        kv_widths({}, "c")
