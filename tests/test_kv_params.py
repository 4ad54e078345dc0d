"""The eight tensors, worked out here by each consumer's formula, and their slices by rank."""

import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import STEPS
from kvc8.ir.kv_params import (
    Channels,
    DequantForm,
    KVParams,
    QuantForm,
    by_channel,
    derive,
    heads_of_rank,
    shard,
    shard_channels,
)

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
NAMES = (
    "llama_fp16_m3",
    "qwen2_fp16_none_asym",
    "llama_fp16_m3_mindie_safe_tensor",
    "v1_qwen2_fp16_w8a8c8",
)
HEADS, HEAD_DIM = 2, 32


def stored(name: str, layer: int, directory: Path | None = None) -> tuple[Channels, Channels]:
    """K's and V's scales and offsets as a golden directory has them, or one made of it."""
    checkpoint = open_checkpoint(directory or GOLDEN / name / "quant")
    k, v = (
        by_channel(checkpoint.read(s.scale), checkpoint.read(str(s.offset)), 64, name)
        for s in checkpoint.kv[layer]
    )
    return k, v


@cache
def written(name: str) -> dict[str, Tensor]:
    """What msModelSlim wrote, as safetensors reads it."""
    [weights] = (GOLDEN / name / "quant").glob("*.safetensors")
    return load_file(weights)


def numbers(name: str, layer: int, side: str) -> tuple[list[float], list[int]]:
    """Scale and offset of a K or V as numbers."""
    prefix = f"model.layers.{layer}.self_attn.{side}_proj.kv_cache_"
    tensors = written(name)
    offset = tensors[f"{prefix}offset"].tolist()
    return tensors[f"{prefix}scale"].tolist(), [int(z) for z in offset]


def eight(
    k: Channels, v: Channels, quant: QuantForm, dequant: DequantForm, dtype: torch.dtype
) -> KVParams:
    return derive(
        k, v, quant=quant, dequant=dequant, model_dtype=dtype, head_dim=HEAD_DIM, where="layer 0"
    )


def bits(value: float) -> int:
    """The bits of a float32, as MindIE takes them: numpy.frombuffer(float32 bytes, int32)."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def check(found: Tensor, values: list[float] | list[int], dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert torch.equal(found.reshape(-1), torch.tensor(values, dtype=dtype))


def sharded(name: str, directory: Path) -> None:
    """The same tensors in three files and an index."""
    tensors, weight_map = written(name), {}
    for number in range(3):
        file = f"quant_model_weight_w8a8-0000{number + 1}-of-00003.safetensors"
        part = {n: tensors[n] for n in sorted(tensors)[number::3]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    path = directory / "quant_model_weight_w8a8.safetensors.index.json"
    path.write_text(json.dumps(index))


def c8_only(name: str, directory: Path, fused: bool = False) -> None:
    """Without what W8A8 needs; `fused`, with the KV scales below a fused linear."""
    path = directory / "quant_model_description.json"
    labels = json.loads(path.read_text())

    def renamed(tensor: str) -> str:
        below = fused and ".kv_cache_" in tensor
        return tensor.replace("self_attn.", "self_attn.qkv_proj.") if below else tensor

    kept = {n: t for n, t in written(name).items() if labels[n] in ("FLOAT", "C8")}
    tensors = {renamed(n): t for n, t in kept.items()}
    save_file(tensors, directory / "quant_model_weight.safetensors")
    rest = {renamed(n): v for n, v in labels.items() if n in kept or "." not in n}
    path.write_text(json.dumps({**rest, "model_quant_type": "FLOAT"}))


VARIANTS: dict[str, Callable[[str, Path], None]] = {
    "sharded": sharded,
    "C8 only": c8_only,
    "fused": lambda name, directory: c8_only(name, directory, fused=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_eight_are_the_same_however_the_directory_is_cut(
    name: str, variant: str, tmp_path: Path
) -> None:
    for file in (GOLDEN / name / "quant").glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name.replace("_w8a8", "")).write_text(file.read_text())
    VARIANTS[variant](name, tmp_path)
    for layer in range(4):
        check_the_eight(*stored(name, layer, tmp_path), name, layer)
        for rank in range(4):  # of two KV heads: each is kept on two ranks
            sides = (shard_channels(side, HEADS, rank, 4) for side in stored(name, layer, tmp_path))
            one_head = slice(rank // 2 * HEAD_DIM, (rank // 2 + 1) * HEAD_DIM)
            check_the_eight(*sides, name, layer, one_head)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", range(4))
def test_the_eight_of_what_msmodelslim_wrote(name: str, layer: int) -> None:
    k, v = stored(name, layer)
    assert any(v.offset.tolist()) == ("asym" in name)
    check_the_eight(k, v, name, layer)


def check_the_eight(
    k: Channels, v: Channels, name: str, layer: int, part_of: slice = slice(None)
) -> None:
    """Against numbers that the formulas of the module's table give for what is stored."""
    page = eight(k, v, "page", "page", torch.float16)
    atb = eight(k, v, "atb", "atb", torch.float16)
    divide = eight(k, v, "divide", "fused_infer", torch.float16)
    multiply = eight(k, v, "multiply", "fused_infer", torch.float16)
    fused = eight(k, v, "rope_quant_cache", "fused_infer", torch.float16)
    anti = eight(k, v, "divide", "anti_quant", torch.float16)
    for side in "kv":
        s, z = (values[part_of] for values in numbers(name, layer, side))
        get = {
            f"{part}_{what}": f"{side}_{part}_{what}"
            for part in ("quant", "dequant")
            for what in ("scale", "offset")
        }
        half, single = torch.float16, torch.float32
        check(getattr(page, get["quant_scale"]), s, half)
        check(getattr(page, get["quant_offset"]), z, half)
        check(getattr(page, get["dequant_scale"]), s, half)
        check(getattr(page, get["dequant_offset"]), z, half)
        check(getattr(atb, get["quant_scale"]), s, half)
        check(getattr(atb, get["quant_offset"]), z, torch.int8)
        check(getattr(atb, get["dequant_scale"]), [bits(x) for x in s], torch.int64)
        check(getattr(atb, get["dequant_offset"]), [-x for x in z], torch.int32)
        check(getattr(divide, get["quant_scale"]), s, single)
        check(getattr(divide, get["quant_offset"]), z, torch.int32)
        check(getattr(anti, get["dequant_scale"]), s, single)
        check(getattr(anti, get["dequant_offset"]), [-x for x in z], single)
        check(getattr(multiply, get["quant_scale"]), [1 / x for x in s], half)
        check(getattr(multiply, get["quant_offset"]), z, half)
        check(getattr(fused, get["quant_scale"]), s, single)
        check(getattr(fused, get["quant_offset"]), z, single)
        assert getattr(fused, get["quant_scale"]).shape == (len(s) // HEAD_DIM, HEAD_DIM)
        assert getattr(fused, get["quant_offset"]).shape == (len(s) // HEAD_DIM, HEAD_DIM)
        check(getattr(fused, get["dequant_scale"]), s, half)
        check(getattr(fused, get["dequant_offset"]), [-x for x in z], half)


@pytest.mark.parametrize("name", NAMES)
def test_every_dequantizer_gives_the_same_number(name: str) -> None:
    k, v = stored(name, 0)
    q = torch.arange(-128, 128)[:, None].double()
    expected = (q - k.offset.double()) * k.scale.double()
    for form in get_args(DequantForm):
        params = eight(k, v, "page", form, torch.float16)
        scale = params.k_dequant_scale
        scale = STEPS["float_bits"](scale) if scale.dtype == torch.int64 else scale
        sign = -1 if form == "page" else 1
        found = (q + sign * params.k_dequant_offset.double()) * scale.double()
        assert torch.equal(found, expected), form


def test_bfloat16_models_keep_float32_descales() -> None:
    side = Channels(torch.tensor([0.25, 3.0]).bfloat16(), torch.tensor([5.0, -7.0]).bfloat16())
    params = derive(
        side,
        side,
        quant="atb",
        dequant="atb",
        model_dtype=torch.bfloat16,
        head_dim=2,
        where="layer 0",
    )
    check(params.k_quant_scale, [0.25, 3.0], torch.bfloat16)
    check(params.v_dequant_scale, [0.25, 3.0], torch.float32)
    check(params.v_dequant_offset, [-5, 7], torch.int32)


@pytest.mark.parametrize("form", ["page", "atb", "fused_infer", "anti_quant"])
def test_a_symmetric_offset_is_zero_without_a_sign(form: DequantForm) -> None:
    k, v = stored("llama_fp16_m3", 0)
    offset = eight(k, v, "divide", form, torch.float16).k_dequant_offset
    assert not offset.any()
    assert not torch.signbit(offset).any()


def test_packed_scales_are_float_bits() -> None:
    scale = torch.tensor([1.0, 0.0478515625, 6e-8, 65504.0])
    packed = STEPS["int_bits"](scale)
    assert packed[0] == 0x3F800000
    assert torch.equal(STEPS["float_bits"](packed), scale)


def test_the_deq_scale_of_a_linear_unpacks() -> None:
    checkpoint = open_checkpoint(GOLDEN / "llama_fp16_m3" / "quant")
    linear = checkpoint.w8a8["model.layers.0.self_attn.q_proj"]
    scales = checkpoint.read(str(linear.weight_scale)).float().reshape(-1)
    expected = checkpoint.read(linear.input_scale) * scales
    assert torch.equal(STEPS["float_bits"](checkpoint.read(linear.deq_scale)), expected)


def test_a_scale_for_the_whole_tensor_spreads_over_channels() -> None:
    side = by_channel(torch.tensor([0.5]), None, 6, "layer 0")
    assert (side.scale.tolist(), side.offset.tolist()) == ([0.5] * 6, [0.0] * 6)
    params = derive(
        side,
        side,
        quant="rope_quant_cache",
        dequant="atb",
        model_dtype=torch.float16,
        head_dim=3,
        where="layer 0",
    )
    check(params.k_quant_scale, [0.5] * 6, torch.float32)
    check(params.k_dequant_scale, [bits(0.5)] * 6, torch.int64)


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (2, 8, [[0], [0], [0], [0], [1], [1], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
        (3, 3, [[0], [1], [2]]),
    ],
)
def test_ranks_share_whole_heads(heads: int, ranks: int, expected: list[list[int]]) -> None:
    assert [list(heads_of_rank(heads, rank, ranks)) for rank in range(ranks)] == expected
    channels = torch.arange(heads * 2)
    for rank, mine in enumerate(expected):
        slices = [c for head in mine for c in (2 * head, 2 * head + 1)]
        assert shard(channels, heads, rank, ranks).tolist() == slices
        assert shard(channels.expand(5, -1), heads, rank, ranks).shape == (5, len(slices))


def test_slicing_before_and_after_deriving_agree() -> None:
    k, v = stored("qwen2_fp16_none_asym", 1)
    whole = eight(k, v, "atb", "atb", torch.float16)
    for rank in range(4):
        mine = [shard_channels(side, HEADS, rank, 4) for side in (k, v)]
        part = eight(mine[0], mine[1], "atb", "atb", torch.float16)
        for name, value in vars(whole).items():
            assert torch.equal(getattr(part, name), shard(value, HEADS, rank, 4))


def side(scale: float = 1.0, offset: float = 0.0) -> Channels:
    return Channels(torch.tensor([scale]), torch.tensor([offset]))


@pytest.mark.parametrize(
    ("scale", "offset", "sentence"),
    [
        ([0.0], [0.0], "k: a scale is not a finite positive number; calibrate the model again"),
        ([-1.0], [0.0], "k: a scale is not a finite positive number; calibrate the model again"),
        (
            [float("nan")],
            [0.0],
            "k: a scale is not a finite positive number; calibrate the model again",
        ),
        (
            [1.0],
            [0.5],
            "k: an offset is not a whole number from -256 to 256; calibrate the model again",
        ),
        (
            [1.0],
            [float("nan")],
            "k: an offset is not a whole number from -256 to 256; calibrate the model again",
        ),
        (
            [1.0, 1.0],
            [0.0],
            "k: the scale holds 2 numbers for 4 channels; "
            "use the config.json that the model was quantized with",
        ),
    ],
)
def test_bad_values_are_refused(scale: list[float], offset: list[float], sentence: str) -> None:
    with pytest.raises(ModelError) as raised:
        by_channel(torch.tensor(scale), torch.tensor(offset), 4, "k")
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("channels", "quant", "sentence"),
    [
        (
            side(1e-5),
            "multiply",
            "layer 0: a scale is not a finite positive number; "
            "it does not fit torch.float16: choose a form that keeps float32 scales",
        ),
        (
            side(1e-9),
            "atb",
            "layer 0: a scale is not a finite positive number; "
            "it does not fit torch.float16: choose a form that keeps float32 scales",
        ),
        (
            side(offset=128.0),
            "atb",
            "layer 0: an offset does not fit int8; choose a form that keeps wider offsets",
        ),
    ],
)
def test_what_a_form_cannot_hold_is_refused(
    channels: Channels, quant: QuantForm, sentence: str
) -> None:
    with pytest.raises(ModelError) as raised:
        eight(channels, channels, quant, "page", torch.float16)
    assert str(raised.value) == sentence


def test_a_float32_model_is_refused() -> None:
    with pytest.raises(ModelError) as raised:
        eight(side(), side(), "page", "page", torch.float32)
    assert str(raised.value) == (
        "layer 0: the model computes in torch.float32 and an int8 KV cache wants float16 or "
        "bfloat16; convert the model"
    )


@pytest.mark.parametrize(
    ("heads", "rank", "ranks", "sentence"),
    [
        (
            8,
            0,
            3,
            "tensor parallel over 3: cannot share out 8 KV heads evenly; "
            "use 1, 2, 4, 8 or a multiple of 8 ranks",
        ),
        (
            2,
            0,
            3,
            "tensor parallel over 3: cannot share out 2 KV heads evenly; "
            "use 1, 2 or a multiple of 2 ranks",
        ),
        (2, 2, 2, "tensor parallel over 2: has no rank 2; use a rank from 0 to 1"),
    ],
)
def test_uneven_shares_are_refused(heads: int, rank: int, ranks: int, sentence: str) -> None:
    with pytest.raises(ModelError) as raised:
        heads_of_rank(heads, rank, ranks)
    assert str(raised.value) == sentence


def test_no_slice_goes_through_a_head() -> None:
    with pytest.raises(ModelError) as raised:
        shard(torch.zeros(7), 2, 0, 2)
    assert str(raised.value) == (
        "tensor parallel over 2: 7 channels are not 2 whole heads; "
        "check num_key_value_heads in config.json"
    )
