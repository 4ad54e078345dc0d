"""Run the forms of a model that kvc8-verify compares on one prompt, and keep what each gave."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.onnx import emitter, runner
from kvc8.backends.runtime import model as runtime
from kvc8.backends.runtime.generate import StepModel
from kvc8.backends.runtime.inputs import Rows, inputs
from kvc8.ir import npu, ops
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.expression import make
from kvc8.ir.program import Program, argument, is_call

BLOCK = 128  # tokens


@dataclass(frozen=True)
class Tokens:
    """What every form is fed: a prompt, and then one token a step."""

    prompt: Sequence[int]
    steps: Sequence[int]

    @property
    def table(self) -> list[int]:
        """Blocks for all, out of order, so that an order taken for granted shows."""
        return list(range(-(-(len(self.prompt) + len(self.steps)) // BLOCK)))[::-1]

    @property
    def slots(self) -> Tensor:
        """The flat cache slot of each token, int64."""
        count = len(self.prompt) + len(self.steps)
        return torch.tensor([self.table[p // BLOCK] * BLOCK + p % BLOCK for p in range(count)])


@dataclass
class Run:
    """What one form gave for the prompt and the steps after it."""

    logits: list[Tensor] = field(default_factory=list)  # of each call, [rows, vocabulary]
    caches: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)  # what was quantized, by cache


def generate(program: Program, checkpoint: Checkpoint, prompt: Sequence[int], steps: int) -> Tokens:
    """The tokens that a program continues a prompt with, greedily."""
    room = Tokens(prompt, [0] * steps)
    model = _load({"prefill": program, "decode": program}, checkpoint, room)
    logits, made = model.prefill([prompt], [room.table]), list[int]()
    for step in range(steps):
        made.append(int(logits[-1].argmax()))
        logits = model.decode([made[-1]], [len(prompt) + step + 1], [room.table])
    return Tokens(prompt, made)


def replay(
    programs: Mapping[str, Program], checkpoint: Checkpoint, tokens: Tokens, chunk: int = 0
) -> Run:
    """Feed the tokens to programs by phase: the prompt, whole or in chunks, and decode steps."""
    model, made = _load(programs, checkpoint, tokens), Run()
    prompt, table = tokens.prompt, tokens.table
    size = chunk or len(prompt)
    parts = [Rows(prompt[i : i + size], i, table) for i in range(0, len(prompt), size)]
    made.logits.append([model.mixed([rows], observe=watch(made)) for rows in parts][-1])
    for length, token in enumerate(tokens.steps, len(prompt) + 1):
        made.logits.append(model.decode([token], [length], [table], observe=watch(made)))
    made.caches = dict(model.caches)
    return made


def feed_tokens(model: StepModel, tokens: Tokens) -> Run:
    """Feed the tokens to a model that nobody watches: the prompt whole, then decode steps."""
    made, table = Run(), tokens.table
    made.logits.append(model.mixed([Rows(tokens.prompt, 0, table)]))
    for length, token in enumerate(tokens.steps, len(tokens.prompt) + 1):
        made.logits.append(model.decode([token], [length], [table]))
    made.caches = dict(model.caches)
    return made


def one_program(program: Program, checkpoint: Checkpoint, tokens: Tokens) -> Run:
    """Feed the tokens to a program that serves both phases, as those before lowering do."""
    return replay({"prefill": program, "decode": program}, checkpoint, tokens)


def in_onnxruntime(program: Program, checkpoint: Checkpoint, tokens: Tokens) -> Run:
    """Feed the tokens to ONNX Runtime, by a model of the program written for the occasion.

    What it quantizes cannot be watched from outside, so it is made an output.
    """
    probe, watched = _probe(program)
    empty = _load({"prefill": program, "decode": program}, checkpoint, tokens)
    made, caches = Run(), dict(empty.caches)
    with tempfile.TemporaryDirectory() as folder:
        emitter.emit(probe, checkpoint, Path(folder) / "onnx")
        session = runner.load(Path(folder) / "onnx")
        for step in _steps(program, tokens):
            logits, *rest = session.run({**step, **caches})
            seen, after = rest[: len(watched)], rest[len(watched) :]
            for name, rows in zip(watched, seen, strict=True):
                made.rows.setdefault(name, []).append(rows.flatten(1))
            caches = dict(zip(caches, after, strict=True))
            made.logits.append(logits)
    made.caches = caches
    return made


def _load(programs: Mapping[str, Program], checkpoint: Checkpoint, tokens: Tokens) -> runtime.Model:
    blocks = len(tokens.table)
    return runtime.load(
        programs, lambda r: make(r, checkpoint.read), blocks=blocks, block_size=BLOCK
    )


def _steps(program: Program, tokens: Tokens) -> list[dict[str, Tensor]]:
    """The inputs of each step that the program takes."""
    names = {node.name for node in program.inputs()}
    past = len(tokens.prompt)
    calls = [(0, tokens.prompt), *((past + i, [t]) for i, t in enumerate(tokens.steps))]
    given = (
        inputs([Rows(new, start, tokens.table)], BLOCK, torch.device("cpu")) for start, new in calls
    )
    return [
        {k: v for k, v in step.items() if k in names and isinstance(v, Tensor)} for step in given
    ]


def _probe(program: Program) -> tuple[Program, list[str]]:
    """A program that gives what it quantizes too, and the caches that this goes to."""
    probe = program.copy()
    writes = [w for w in probe.calls(ops.cache_write) if is_call(w.args[1], ops.quantize)]
    rows = [_float_rows(argument(write, 1)) for write in writes]
    [output] = probe.graph.find_nodes(op="output")
    logits, *caches = output.args[0]
    output.args = ([logits, *rows, *caches],)
    return probe, [argument(write, 0).name for write in writes]


def watch(run: Run) -> Callable[[Node, object], None]:
    """Note the float rows that go into each cache."""
    seen: dict[Node, object] = {}

    def observe(node: Node, value: object) -> None:
        seen[node] = value
        for codes, cache in _written(node):
            rows = seen.get(_float_rows(codes))
            if isinstance(rows, Tensor) and rows.is_floating_point():
                run.rows.setdefault(cache.name, []).append(rows.flatten(1))

    return observe


def _written(node: Node) -> list[tuple[Node, Node]]:
    """The rows and the cache of each write that a node makes."""
    if is_call(node, ops.cache_write):
        return [(argument(node, 1), argument(node, 0))]
    if is_call(node, npu.npu_scatter_pa_kv_cache):
        return [(argument(node, 0), argument(node, 2)), (argument(node, 1), argument(node, 3))]
    return []


def _float_rows(codes: Node) -> Node:
    """What was quantized into codes."""
    node = codes
    while is_call(node, torch.ops.aten.reshape.default):
        node = argument(node, 0)
    return argument(node, 0) if is_call(node, ops.quantize, npu.npu_quantize) else codes
