"""Models for the tests of fusion: tiny ones, float or W8A8, with an int8 cache, QUANTIZED."""

import functools
from collections.abc import Callable, Mapping
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
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program, argument, expression_of
from kvc8.ir.run import run
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.verifier.recording import Hook, Parameters, Recording, empty, feed, record

TOKENS = [5, 9, 17, 33, 65, 12, 101, 7, 44, 3, 25, 18, 90]
TABLE = [[7, 2, 11, 5]]
LINEAR = torch.ops.aten.linear.default
Values, Named = list[torch.Tensor], dict[str, torch.Tensor]


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
        seen = _ranges(directory, dtype)
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
def _ranges(directory: Path, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """What each linear of the float model sees of a prompt, in float64 whatever the dtype."""
    program, seen = widen(_captured(directory, dtype)), {}
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


def in_doubles(programs: Mapping[str, Program], directory: Path) -> tuple[Values, Named]:
    """A prompt but for its last token by one program, that one by the other: logits and caches.

    These are what the programs mean, with no rounding (ir/precision/twins.py): forms that mean the
    same give the same codes on every CPU, for a value would have to lie within one part in 10**15
    of a middle for others.
    """
    prefill, decode = _recorded(programs, directory)
    logits = [made.twin(made.results[0]) for made in (prefill, decode)]
    return logits, {name: twin for name, (_, twin) in decode.caches.items()}


def with_exact_linears(programs: Mapping[str, Program], directory: Path) -> tuple[Values, Named]:
    """The same in the programs' own dtypes, but for linears: those in float64, and rounded once.

    A sum of many would be rounded in another way where a linear is wider, or on another CPU.
    """
    prefill, decode = _recorded(programs, directory, _exact_linears)
    logits = [made.values[made.results[0]] for made in (prefill, decode)]
    return logits, {name: value for name, (value, _) in decode.caches.items()}


def _recorded(
    programs: Mapping[str, Program],
    directory: Path,
    hook: Callable[[Recording], Hook] | None = None,
) -> list[Recording]:
    parameters, last, found = Parameters(open_checkpoint(directory).read), len(TOKENS) - 1, []
    caches = empty(programs["decode"])
    for phase, tokens, start in (("prefill", TOKENS[:last], 0), ("decode", TOKENS[last:], last)):
        given = feed(tokens, start).inputs(programs[phase])
        found.append(record(programs[phase], parameters, given, caches, hook))
        caches = found[-1].caches
    return found


def _exact_linears(made: Recording) -> Hook:
    def exact(node: Node, value: object) -> object:
        if node.target is not LINEAR:
            return value
        operands = [made.values[arg].double() for arg in node.args]
        return LINEAR(*operands).to(value.dtype)

    return exact
