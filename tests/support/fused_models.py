"""Models for the tests of fusion: tiny ones, float or W8A8, with an int8 cache, QUANTIZED."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from support.onnx_models import with_int8_cache
from support.steps import step, values
from torch.fx import Node

from kvc8.ir.capture.parameters import constant_expression
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.checkpoint.w8a8 import Range, quantize_linear
from kvc8.ir.expression import Expression, cast, make
from kvc8.ir.program import Program, argument, expression_of
from kvc8.ir.run import run
from kvc8.passes import pipeline
from kvc8.passes.options import Options

TOKENS = [5, 9, 17, 33, 65, 12, 101, 7, 44, 3, 25, 18, 90]
TABLE = [[7, 2, 11, 5]]
PAGE = 32  # the smallest block that the NPU's attention takes with an int8 cache
LINEAR = torch.ops.aten.linear.default


def quantized(
    directory: Path,
    dtype: torch.dtype,
    *,
    w8a8: bool,
    zeros: bool,
    keep_float: tuple[str, ...] = (),
    clipped: tuple[str, ...] = (),
    ends: bool = False,
) -> Program:
    """The QUANTIZED program of a float model's directory.

    With `w8a8` all linears of the layers are, but those whose module ends as one of `keep_float`;
    inputs are quantized by their range in a prompt, halved for the modules of `clipped`. `zeros`
    gives the cache zero points, with `ends` up to both ends of int8; inputs have them always.
    """
    program = _captured(directory, dtype).copy()
    if w8a8:
        seen = _ranges(directory)
        for linear in program.calls(LINEAR):
            origin = str(linear.meta["origin"])
            if "layers" in origin and not origin.endswith(keep_float or ("none",)):
                part = 0.5 if origin.endswith(clipped or ("none",)) else 1.0
                low, high = (end * part for end in seen[origin])
                _make_w8a8(linear, directory, Range(low, high), dtype)
    return with_int8_cache(program, zeros, ends)


@functools.cache
def _captured(directory: Path, dtype: torch.dtype) -> Program:
    return capture(open_checkpoint(directory), dtype=dtype)


@functools.cache
def _ranges(directory: Path) -> dict[str, tuple[float, float]]:
    """What each linear of the float model sees of a prompt."""
    program, seen = _captured(directory, torch.float32), {}
    values_of: dict[Node, torch.Tensor] = {}

    def watch(node: Node, value: object) -> None:
        values_of[node] = value
        if node.target is LINEAR:
            x = values_of[argument(node, 0)]
            seen[str(node.meta["origin"])] = (float(x.min()), float(x.max()))

    run(program, {**values(program, directory), **prompt()}, watch)
    return seen


def _make_w8a8(linear: Node, directory: Path, seen: Range, dtype: torch.dtype) -> None:
    read = open_checkpoint(directory).read
    tensors = [
        make(expression_of(node), read) for node in linear.args[1:] if isinstance(node, Node)
    ]
    weight, bias = tensors[0], tensors[1] if len(tensors) > 1 else None
    made = quantize_linear(weight.float(), bias, seen, dtype)
    deq = constant_expression(made["deq_scale"])
    deq = Expression("float_bits", (deq,)) if made["deq_scale"].dtype is torch.int64 else deq
    names = ("weight", "input_scale", "input_offset")
    parts = [constant_expression(made[name]) for name in names]
    expression = Expression("w8a8", (*parts, deq, constant_expression(made["quant_bias"])))
    argument(linear, 1).meta["expression"] = cast(expression, dtype)


def prompt(block: int = 4) -> dict[str, torch.Tensor]:
    return step(TOKENS, [0], [len(TOKENS)], TABLE, block=block)


def lowered(program: Program, fuse: str, **options: str) -> dict[str, Program]:
    return pipeline.lower_for_npu(program, Options(fuse=fuse, **options))[0]


def in_turn(
    programs: Mapping[str, Program], directory: Path, observe: object = None
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """A prompt but for its last token by one program, that one by the other: logits and caches."""
    last, logits = len(TOKENS) - 1, []
    caches = {
        name: value
        for name, value in values(programs["decode"], directory, block=PAGE).items()
        if name in {cache.name for cache in programs["decode"].caches()}
    }
    for phase, start, end in (("prefill", 0, last), ("decode", last, last + 1)):
        program = programs[phase]
        given = step(TOKENS[start:end], [start], [end], TABLE, block=PAGE)
        hosts = {"kv_lens": [end], "query_ends": [end - start]}
        now = {**values(program, directory, block=PAGE), **given, **hosts, **caches}
        first, *after = run(program, now, observe)
        logits.append(first)
        caches = dict(zip(caches, after, strict=True))
    return logits, caches
