"""Record a decode step once on a device and replay it, without Python between its launches.

Written from torch_npu 2.13's own source and tests (npu/graphs.py, test_ifa_update.py) and never run
on a device; the tests here replay on a CPU by a stand-in for `torch.npu` with the same interface.

A recorded graph reads the tensors that it was recorded with, so each number of sequences has its
own graph and its own input buffers. The lengths of the sequences are a list on the host, which a
graph holds as numbers: `NPUGraph.update` gives every attention call the new ones before a replay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, type_of
from kvc8.ir.run import Observe, Value, run
from kvc8.ir.types import IntsType, TensorType

ATTENTION = (npu.npu_fused_infer_attention_score,)  # whose lengths a graph can change
TABLE = "block_table"  # whose width may grow from step to step; that of a window's never does
Lengths = list[dict[str, Value]]  # of each call of attention, by argument


class Npu(Protocol):
    """What is used of `torch.npu`."""

    def NPUGraph(self) -> Any:
        """A graph without anything in it."""

    def graph(self, npu_graph: Any, *, auto_dispatch_capture: bool) -> Any:
        """Record into a graph what runs inside of this context."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""


@dataclass
class Recorded:
    """A step for one number of sequences."""

    program: Program
    graph: Any
    buffers: Mapping[str, Tensor]
    results: list[Tensor]

    def replay(self, values: Mapping[str, Value]) -> list[Tensor]:
        """Run it with other inputs of the same sizes. The logits are those of the last replay."""
        for name, buffer in self.buffers.items():
            _fill(buffer, values[name])
        self.graph.update(cpu_update_input=_lengths(self.program, values))
        self.graph.replay()
        return self.results


class Recorder:
    """Runs programs as `kvc8.ir.run.run` does, and steps of decode by graphs.

    `blocks` is how many blocks the cache has: no table is wider. The caches and parameters must be
    the same tensors at every call, as those of runtime.Model are.
    """

    def __init__(self, npu: Npu, blocks: int) -> None:
        self.npu, self.blocks = npu, blocks
        self.recorded: dict[tuple[int, int], Recorded] = {}

    def __call__(
        self, program: Program, values: Mapping[str, Value], observe: Observe | None = None
    ) -> list[Tensor]:
        """The logits and the caches that a program gives."""
        # A graph has no values to look at, and only decode comes again with the same sizes.
        tables = _tables(program)
        if observe or not tables:
            return run(program, values, observe)
        key = id(program), _count(values[tables[0]])
        if key not in self.recorded:
            self.recorded[key] = self._record(program, values)
        return self.recorded[key].replay(values)

    def _record(self, program: Program, values: Mapping[str, Value]) -> Recorded:
        _check_lists(program)
        given = {node.name: values[node.name] for node in program.inputs()}
        buffers = {n: self._buffer(n, x) for n, x in given.items() if isinstance(x, Tensor)}
        inside = {**values, **buffers}
        run(program, inside)  # what is set up at the first call must not be part of a graph
        self.npu.synchronize()
        graph = self.npu.NPUGraph()
        with self.npu.graph(graph, auto_dispatch_capture=True):
            results = run(program, inside)
        return Recorded(program, graph, buffers, results)

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        shape = (value.shape[0], self.blocks) if name == TABLE else value.shape
        buffer = torch.zeros(shape, dtype=value.dtype, device=value.device)
        _fill(buffer, value)
        return buffer


def _check_lists(program: Program) -> None:
    """Refuse a program whose lists of numbers go where a graph cannot change them."""
    for node in program.inputs():
        for user in node.users:
            if not isinstance(type_of(node), TensorType) and user.target not in ATTENTION:
                what = f"takes the list {node.name}, which a graph holds as it was recorded"
                raise TargetError(user.name, what, "run without --graph")


def _lengths(program: Program, values: Mapping[str, Value]) -> Lengths:
    """The lists of each call of attention, in the order of the calls."""
    return [
        {
            argument: values[given.name]
            for argument, given in node.kwargs.items()
            if isinstance(given, Node) and isinstance(type_of(given), IntsType)
        }
        for node in program.calls(*ATTENTION)
    ]


def _tables(program: Program) -> list[str]:
    """The inputs that attention finds pages by: only decode has such."""
    given = [node.kwargs.get("block_table") for node in program.calls(*ATTENTION)]
    return [node.name for node in given if isinstance(node, Node) and node.op == "placeholder"]


def _count(table: Value) -> int:
    """The sequences of a step."""
    assert isinstance(table, Tensor)
    return int(table.shape[0])


def _fill(buffer: Tensor, value: Value) -> None:
    """Copy a value into a buffer of its shape, or of more columns, which are set to zero."""
    assert isinstance(value, Tensor)
    if buffer.shape == value.shape:
        buffer.copy_(value)
    else:
        buffer.zero_()
        buffer[:, : value.shape[1]].copy_(value)
