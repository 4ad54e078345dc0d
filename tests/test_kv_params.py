"""The eight parameters that programs hold, against numbers worked out here by each op's formula."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx.node import Argument, Node

from kvc8.ir import npu
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import STEPS, Read, make
from kvc8.ir.program import Program, expression_of
from kvc8.ir.ranks import of_rank
from kvc8.passes.fold_kv_scales import fold_kv_scales
from kvc8.passes.options import Options
from kvc8.passes.pipeline import lower_for_npu, quantize_passes
from kvc8.passes.pipeline import run as run_passes

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
NAMES = (
    "llama_fp16_m3",
    "qwen2_fp16_none_asym",
    "llama_fp16_m3_mindie_safe_tensor",
    "v1_qwen2_fp16_w8a8c8",
)
SIDES = [(layer, side) for layer in range(4) for side in "kv"]
HEAD_DIM = 32  # and two KV heads
SINGLE, HALF = torch.float32, torch.float16


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


def quantized(directory: Path, ranks: int = 1) -> Program:
    """With the scales as they are stored, for the numbers here are of those."""
    program = capture(open_checkpoint(directory), HALF)
    run_passes(program, quantize_passes(Options(kv_scales="as-is", ranks=ranks)))
    return program


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


def fused(name: str, directory: Path) -> None:
    """With the KV scales below a fused linear."""
    path = directory / "quant_model_description.json"

    def renamed(tensor: str) -> str:
        return (
            tensor.replace("self_attn.", "self_attn.qkv_proj.")
            if ".kv_cache_" in tensor
            else tensor
        )

    tensors = {renamed(n): t for n, t in written(name).items()}
    save_file(tensors, directory / "quant_model_weight.safetensors")
    labels = json.loads(path.read_text())
    path.write_text(json.dumps({renamed(n): label for n, label in labels.items()}))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_eight_of_what_msmodelslim_wrote(name: str) -> None:
    directory = GOLDEN / name / "quant"
    program, read = quantized(directory), open_checkpoint(directory).read
    check_folded(program.copy(), read, name)
    check_fused(lower_for_npu(program, Options(fuse="on"))[0]["decode"], read, name)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [sharded, fused])
@pytest.mark.parametrize("name", NAMES)
def test_the_eight_are_the_same_however_the_directory_is_cut(
    name: str, cut: Callable[[str, Path], None], tmp_path: Path
) -> None:
    for file in (GOLDEN / name / "quant").glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name.replace("_w8a8", "")).write_text(file.read_text())
    cut(name, tmp_path)
    check_folded(quantized(tmp_path), open_checkpoint(tmp_path).read, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_has_the_eight_of_its_heads(name: str) -> None:
    directory = GOLDEN / name / "quant"
    program, read = quantized(directory, ranks=4), open_checkpoint(directory).read
    decode = lower_for_npu(program.copy(), Options(fuse="on", ranks=4))[0]["decode"]
    for rank in range(4):  # of two KV heads: each is kept on two ranks
        head = slice(rank // 2 * HEAD_DIM, (rank // 2 + 1) * HEAD_DIM)
        check_folded(of_rank(program, rank), read, name, head)
        check_fused(of_rank(decode, rank), read, name, head)


def check_folded(program: Program, read: Read, name: str, part_of: slice = slice(None)) -> None:
    """npu_quantize computes x / s + z, npu_anti_quant (q + o) * s; neither is told of zeros."""
    run_passes(program, (fold_kv_scales,))
    quantizers = program.calls(npu.npu_quantize)
    dequantizers = program.calls(npu.npu_anti_quant)
    for which, quant, back in zip(SIDES, quantizers, dequantizers, strict=True):
        s, z = (of_all[part_of] for of_all in numbers(name, *which))
        used = any(numbers(name, *which)[1])
        check(quant.args[1], read, s, SINGLE)
        check(quant.args[2], read, z if used else None, torch.int32)
        check(back.args[1], read, s, SINGLE)
        check(back.kwargs["offset"], read, [-x for x in z] if used else None, SINGLE)


def check_fused(decode: Program, read: Read, name: str, part_of: slice = slice(None)) -> None:
    """The op that writes computes x / s + z by head; attention (q + o) * s in the model's dtype."""
    writes = decode.calls(npu.npu_rope_quant_kvcache)
    attentions = decode.calls(npu.npu_fused_infer_attention_score)
    for layer, (write, attention) in enumerate(zip(writes, attentions, strict=True)):
        for i, (side, long) in enumerate((("k", "key"), ("v", "value"))):
            s, z = (of_all[part_of] for of_all in numbers(name, layer, side))
            used = any(numbers(name, layer, side)[1])
            by_head = check(write.args[6 + i], read, s, SINGLE)
            assert by_head.shape == (len(s) // HEAD_DIM, HEAD_DIM)
            check(write.kwargs[f"offset_{side}"], read, z if used else None, SINGLE)
            check(attention.kwargs[f"{long}_antiquant_scale"], read, s, HALF)
            kept = used and side == "v"  # K's adds the same to every logit of a query
            offset = attention.kwargs.get(f"{long}_antiquant_offset")
            check(offset, read, [-x for x in z] if kept else None, HALF)


def check(
    given: Argument, read: Read, values: list[float] | list[int] | None, dtype: torch.dtype
) -> Tensor:
    """A parameter is exactly this, its zeros without a sign; or there is none."""
    if values is None:
        assert given is None
        return torch.empty(0)
    assert isinstance(given, Node)
    found = make(expression_of(given), read)
    expected = torch.tensor(values, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found.reshape(-1), expected)
    assert torch.equal(torch.signbit(found.reshape(-1)), torch.tensor([x < 0 for x in values]))
    return found


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
