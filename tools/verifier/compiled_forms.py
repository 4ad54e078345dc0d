"""Run what lies compiled on disk on the tokens of kvc8-verify: NPU artifacts and ONNX models."""

import tempfile
from pathlib import Path
from typing import Literal

from torch import Tensor

from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.onnx import emitter
from kvc8.backends.onnx.model import OnnxModel, open_model
from kvc8.backends.runtime import model as runtime
from kvc8.backends.runtime.inputs import Rows
from kvc8.ir import ops
from kvc8.ir.checkpoint.model_files import file_names, model_file, read_json
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.nz import from_nz
from kvc8.ir.program import Program
from kvc8.tools.verifier.forms import BLOCK, Run, Tokens, feed_tokens


def of_compiled(out: Path, tokens: Tokens) -> Run:
    """Run an NPU artifact, emulated, or an ONNX model of any flavor.

    Raises ModelError, TargetError or IRError where it is none of them, or damaged.
    """
    manifest = model_file(out, "manifest.json") if "manifest.json" in file_names(out) else None
    if manifest and read_json(manifest).get("format") == "kvc8-onnx":
        return _in_onnxruntime(open_model(out), tokens)
    artifact = read(out)
    blocks = len(tokens.table)
    model = runtime.load(artifact.side_by_side(), artifact.make, blocks=blocks, block_size=BLOCK)
    made = feed_tokens(model, tokens)
    for cache in artifact.layout.caches:
        if cache.format == "nz":
            made.caches[cache.name] = from_nz(made.caches[cache.name], cache.heads)
    return made


def in_gqa(program: Program, checkpoint: Checkpoint, tokens: Tokens) -> Run:
    """Run a QUANTIZED program without zero points by GroupQueryAttention."""
    with tempfile.TemporaryDirectory() as folder:
        emitter.emit(program, checkpoint, Path(folder) / "onnx", "gqa")
        return _in_onnxruntime(open_model(Path(folder) / "onnx"), tokens)


def has_offsets(program: Program) -> bool:
    """Whether an int8 cache of a QUANTIZED program has zero points."""
    return any(call.args[2] is not None for call in program.calls(ops.dequantize))


def scales_by(program: Program) -> Literal["channel", "token"]:
    """Whose scales the int8 caches of a QUANTIZED program have, as in passes.options.Options."""
    return "token" if program.calls(ops.dequantize_tokens) else "channel"


def _in_onnxruntime(model: OnnxModel, tokens: Tokens) -> Run:
    if model.flavor != "gqa":
        model.allocate(len(tokens.table), [])
        return feed_tokens(model, tokens)
    length, made = len(tokens.prompt) + len(tokens.steps), Run()
    model.allocate(1, [length])
    made.logits.append(model.mixed([Rows(tokens.prompt, 0, [0])]))
    for i, token in enumerate(tokens.steps, len(tokens.prompt)):
        made.logits.append(model.decode([token], [i + 1], [[0]]))
    made.caches = {name: _paged(cache, tokens) for name, cache in model.caches.items()}
    return made


def _paged(dense: Tensor, tokens: Tokens) -> Tensor:
    """A dense cache [1, heads, L, head_dim] as pages [N, S, heads, head_dim]."""
    rows = dense[0].transpose(0, 1)
    pages = rows.new_zeros(len(tokens.table), BLOCK, *rows.shape[1:])
    pages.flatten(0, 1)[tokens.slots] = rows[: len(tokens.slots)]
    return pages
