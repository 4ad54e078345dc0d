"""What the tests of ONNX share: models that were emitted, and what they are compared by."""

import functools
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from safetensors.torch import save_file

from kvc8.backends.onnx.emitter import Flavor, emit
from kvc8.backends.onnx.runner import Session, load
from kvc8.ir import ops
from kvc8.ir.capture.parameters import constant_expression
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import Expression, make
from kvc8.ir.program import Program, argument, is_call
from kvc8.ir.run import run
from kvc8.ir.text import parse
from kvc8.passes.pipeline import QUANTIZE
from kvc8.passes.pipeline import run as run_passes

KINDS = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma3")
CHECKPOINTS = Path(__file__).parent.parent / "golden" / "checkpoints"
QUANTIZED = [
    CHECKPOINTS / "llama_fp16_m3" / "quant",  # symmetric
    CHECKPOINTS / "qwen2_fp16_none_asym" / "quant",  # with zero points and biases
]
UNIT = 2.0**-24  # half of what float32 resolves at 1: one rounding is off by at most this, relative
# A sum of 128 products is off by at most 128 units of its size, in whatever order it is taken. A
# token passes 3 of them a layer (projection, attention, MLP) and there are 4 layers.
BOUND = 3 * 4 * 128 * UNIT
# Rounding errors are of first order in the unit, so the same holds of doubles with theirs, 2**-53.
# What quantizes and dequantizes rounds to float32 in both forms alike: equal codes, equal values.
DOUBLE_BOUND = BOUND * 2.0**-29
TABLE = [[7, 2, 11, 5, 9]]


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compiled(program: Program, directory: Path, out: Path, flavor: Flavor = "standard") -> Session:
    emit(program, open_checkpoint(directory), out, flavor)
    return load(out, threads=1)


@dataclass(frozen=True)
class Emitted:
    program: Program
    directory: Path  # of the model
    out: Path


@functools.cache
def _captured(directory: Path, dtype: torch.dtype) -> Program:
    return capture(open_checkpoint(directory), dtype=dtype)


def captured(directory: Path, dtype: torch.dtype = torch.float32) -> Program:
    """The program of a model, which the caller may change."""
    return _captured(directory, dtype).copy()


def quantized(directory: Path) -> Program:
    """The QUANTIZED program of a checkpoint, in float32."""
    program = captured(directory)
    run_passes(program, QUANTIZE)
    return program


def write_stored(directory: Path) -> Path:
    """A checkpoint for programs written by hand."""
    (directory / "config.json").write_text('{"model_type": "llama"}')
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=random)
    save_file(
        {
            "rows": rows,
            "half": rows.half(),
            "bf16": rows.bfloat16(),
            "w8": torch.randint(-128, 128, (6, 8), generator=random, dtype=torch.int8),
            "in_scale": torch.tensor([0.02]),
            "in_offset": torch.tensor([3.0]),
            "scale": torch.rand(6, generator=random),
            "deq_bits": torch.rand(6, generator=random).view(torch.int32).long(),
            "bias": torch.randint(-99, 99, (6,), generator=random, dtype=torch.int32),
        },
        directory / "model.safetensors",
    )
    return directory


def both(
    text: str, directory: Path, out: Path, given: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a program written out gives on a CPU, and in ONNX Runtime."""
    program = parse(text)
    checkpoint = open_checkpoint(directory)
    made = {n.name: make(n.meta["expression"], checkpoint.read) for n in program.parameters()}
    return run(program, {**made, **given}), compiled(program, directory, out).run(given)


def keep(program: Program, made: dict[str, torch.Tensor], results: list[torch.Tensor]) -> None:
    made.update({c.name: r for c, r in zip(program.caches(), results[1:], strict=True)})


def with_int8_cache(program: Program, zeros: bool = False, ends: bool = False) -> Program:
    """A captured float model with scales for its cache; quantized.

    Scales of 1/32 and somewhat above hold what a normalized token gives, values of up to about 4,
    without many at either end. Zero points are odd, where rounding before adding them would show;
    with `ends` they go to both ends of int8, and many values saturate.
    """
    reach = 64 if ends else 20
    for i, cache in enumerate(program.caches()):
        heads, dim = (int(d) for d in cache.meta["type"].shape[2:])
        random = torch.Generator().manual_seed(i)
        scale = torch.rand(heads, dim, generator=random) / 64 + 1 / 32
        zero = torch.randint(-reach, reach, (heads, dim), generator=random) * 2.0 + 1
        zero[0, :2] = torch.tensor([-128.0, 127.0]) if ends else zero[0, :2]
        expressions = (constant_expression(scale), constant_expression(zero) if zeros else None)
        cache.meta["expression"] = Expression("cache", (*expressions, "post-rope"))
    run_passes(program, QUANTIZE)
    return program


def watching(program: Program) -> tuple[Program, list[str]]:
    """A program that gives the float rows that go into each cache too, and the caches' names."""
    probe = program.copy()
    writes = [w for w in probe.calls(ops.cache_write) if is_call(w.args[1], ops.quantize)]
    [output] = probe.graph.find_nodes(op="output")
    logits, *caches = output.args[0]
    rows = [argument(argument(write, 1), 0) for write in writes]
    output.args = ([logits, *rows, *caches],)
    return probe, [argument(write, 0).name for write in writes]


def without_weights(out: Path, name: str = "model") -> onnx.ModelProto:
    """A model whose external weights are inputs, so that it can be checked where it lies."""
    model = onnx.load(out / f"{name}.onnx", load_external_data=False)
    outside = [x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    for x in outside:
        model.graph.initializer.remove(x)
        model.graph.input.append(onnx.helper.make_tensor_value_info(x.name, x.data_type, x.dims))
    return model
