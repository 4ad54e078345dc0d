"""Every form a model may have on disk, as one function: a window's tokens to its logits.

    a model directory   its program as a CPU runs it, QUANTIZED where it has scales or W8A8
    the same, as an engine computes it (tools/engines/arithmetic.py)
    an NPU artifact     its prefill program, emulated as the vendor documents its ops
    an ONNX model       of any flavor, run by ONNX Runtime

Each window is a fresh prompt, and each token's logits are asked for. An engine's prompts see their
own float K and V, and its cache shows in the tokens that follow: so there the prompt is one token,
or as many as are wished, and the others are what decode steps, or chunks, would make of them. They
are computed side by side, as the causal mask allows: each sees what the cache gives back of itself
and of all before it, which is what it sees in a step of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.runtime import model as runtime
from kvc8.backends.runtime.inputs import Rows
from kvc8.ir.capture.build import config_dtype
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.model_files import file_names, model_file, place, read_json
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import make
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.insert_dynamic_quant import insert_dynamic_quant
from kvc8.passes.insert_linear_quant import insert_linear_quant
from kvc8.passes.options import Options
from kvc8.passes.remove_identities import remove_identities
from kvc8.tools.driver.request import open_calibrated
from kvc8.tools.engines.arithmetic import as_engine
from kvc8.tools.quantizer.engine_form import check_dtype
from kvc8.tools.quantizer.engines import NAMES, Engine

LINEARS_ONLY = (remove_identities, insert_linear_quant, insert_dynamic_quant)  # a float cache
BLOCK = 128  # tokens; a program may take any
CHUNK = 1024  # tokens of a reference program at a time: attention takes memory for each pair


@dataclass(frozen=True)
class Form:
    """A model that can be asked: what it is, and tokens [T] to logits [T, vocabulary]."""

    name: str
    kind: str
    logits: Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Setup:
    """How a model directory is to be run; artifacts and ONNX models say that themselves."""

    dtype: torch.dtype | None  # the config's, where None
    passes: Options  # those up to QUANTIZED are read
    float_cache: bool  # W8A8 without C8
    kv_calibrated: Calibrated | None = None  # where K was measured; as the layout implies, if None
    engine: Engine | None = None  # that computes it; kvc8's own reference, if None
    prompt: int = 1  # tokens that an engine takes as a fresh prompt
    chunk: int | None = None  # tokens of a chunk; decode steps follow the prompt, if None


def open_form(path: Path, setup: Setup, window: int) -> Form:
    """Open what lies at `path`, for windows of so many tokens.

    Raises ModelError, TargetError or IRError where it is none of the three, or damaged.
    """
    manifest = model_file(path, "manifest.json") if "manifest.json" in file_names(path) else None
    if manifest and read_json(manifest).get("format") == "kvc8-onnx":
        return _onnx(path)
    return _artifact(path, window) if manifest else _directory(path, setup, window)


def open_float(path: Path, window: int) -> Form:
    """The model directory at `path` with a float cache, computed in float32."""
    checkpoint = open_checkpoint(path)
    program = capture(checkpoint, torch.float32)
    return Form(str(path), "float", _program(program, checkpoint, window))


def with_scales(path: Path, setup: Setup) -> Checkpoint | None:
    """The checkpoint at `path` if it is a model directory whose int8 cache was judged."""
    if setup.float_cache or "manifest.json" in file_names(path):
        return None
    checkpoint = open_calibrated(path, setup.kv_calibrated)
    return checkpoint if checkpoint.kv else None


def _directory(path: Path, setup: Setup, window: int) -> Form:
    checkpoint = open_calibrated(path, setup.kv_calibrated)
    if setup.engine:
        return _in_engine(checkpoint, setup.engine, setup, window)
    program = capture(checkpoint, setup.dtype)
    if not checkpoint.kv and not checkpoint.w8a8:
        return Form(str(path), "float", _program(program, checkpoint, window))
    float_cache = setup.float_cache or not checkpoint.kv
    quantizing = pipeline.quantize_passes(setup.passes)
    pipeline.run(program, LINEARS_ONLY if float_cache else quantizing)
    kind = "reference, float cache" if float_cache else "reference"
    return Form(str(path), kind, _program(program, checkpoint, window))


def _in_engine(checkpoint: Checkpoint, engine: Engine, setup: Setup, window: int) -> Form:
    """A quantized directory in an engine, in the dtype that its config.json says."""
    where = place(checkpoint.path)
    check_dtype(config_dtype(checkpoint), place(checkpoint.path, "config.json"), engine)
    if not checkpoint.kv:
        what = "holds no KV scales"
        raise ModelError(where, what, "leave --as out, or quantize it with kvc8-quantize")
    program = capture(checkpoint)
    pipeline.run(program, pipeline.AS_IS)
    model = _load(as_engine(program, engine), checkpoint, window)

    def logits(tokens: list[int]) -> Tensor:
        table = range(_blocks(len(tokens), BLOCK))
        first = min(setup.chunk or setup.prompt, len(tokens))
        parts = [model.prefill([tokens[:first]], [table], every=True)]
        phase, size = ("chunk", setup.chunk) if setup.chunk else ("decode", len(tokens))
        for at in range(first, len(tokens), size):
            rows = Rows(tokens[at : at + size], at, table)
            parts.append(model.step(phase, [rows], every=True))
        return torch.cat(parts)

    fed = f"chunks of {setup.chunk}" if setup.chunk else "decode"
    return Form(str(checkpoint.path), f"{NAMES[engine]}, {fed}", logits)


def _program(program: Program, checkpoint: Checkpoint, window: int) -> Callable[..., Tensor]:
    """Its attention reads what the cache gives back of every token, so chunks change nothing."""
    model = _load({"decode": program}, checkpoint, window)

    def logits(tokens: list[int]) -> Tensor:
        table = range(_blocks(len(tokens), BLOCK))
        starts = range(0, len(tokens), CHUNK)
        chunks = (Rows(tokens[at : at + CHUNK], at, table) for at in starts)
        return torch.cat([model.step("decode", [rows], every=True) for rows in chunks])

    return logits


def _load(programs: Mapping[str, Program], checkpoint: Checkpoint, window: int) -> runtime.Model:
    return runtime.load(
        programs,
        lambda expression: make(expression, checkpoint.read),
        blocks=_blocks(window, BLOCK),
        block_size=BLOCK,
    )


def _artifact(path: Path, window: int) -> Form:
    artifact = read(path)
    size = artifact.block_size
    model = runtime.load(
        artifact.side_by_side(), artifact.make, blocks=_blocks(window, size), block_size=size
    )
    return Form(str(path), "NPU, emulated", _prefill(model, size))


def _prefill(model: runtime.Model, block: int) -> Callable[[list[int]], Tensor]:
    def logits(tokens: list[int]) -> Tensor:
        return model.prefill([tokens], [range(_blocks(len(tokens), block))], every=True)

    return logits


def _onnx(path: Path) -> Form:
    from kvc8.backends.onnx.model import open_model  # takes a second to import

    model = open_model(path, threads=torch.get_num_threads())

    def logits(tokens: list[int]) -> Tensor:
        model.allocate(None, [len(tokens)])
        return model.prefill([tokens], [range(_blocks(len(tokens), model.block_size))], every=True)

    kind = "ONNX Runtime" + f", {model.flavor}" * (model.flavor != "standard")
    return Form(str(path), kind, logits)


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)
