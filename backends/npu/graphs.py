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

from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program
from kvc8.ir.run import Observe, Value, run

LENGTHS = {"kv_lens": "actual_seq_lengths_kv"}  # lists of a step, as the attention op names them
TABLE = "block_table"  # its width is that of the longest sequence, and grows


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

    graph: Any
    buffers: Mapping[str, Tensor]
    results: list[Tensor]

    def replay(self, values: Mapping[str, Value]) -> list[Tensor]:
        """Run it with other inputs of the same sizes. The logits are those of the last replay."""
        for name, buffer in self.buffers.items():
            _fill(buffer, values[name])
        lengths = {op: values[name] for name, op in LENGTHS.items() if name in values}
        self.graph.update(cpu_update_input=[lengths])
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
        names = {node.name for node in program.inputs()}
        if observe or not names.intersection(LENGTHS):  # a graph has no values to look at
            return run(program, values, observe)
        key = id(program), _count(values)
        if key not in self.recorded:
            self.recorded[key] = self._record(program, values)
        return self.recorded[key].replay(values)

    def _record(self, program: Program, values: Mapping[str, Value]) -> Recorded:
        buffers = {n.name: self._buffer(n.name, values[n.name]) for n in program.inputs()}
        tensors = {name: x for name, x in buffers.items() if isinstance(x, Tensor)}
        inside = {**values, **tensors}
        run(program, inside)  # what is set up at the first call must not be part of a graph
        self.npu.synchronize()
        graph = self.npu.NPUGraph()
        with self.npu.graph(graph, auto_dispatch_capture=True):
            results = run(program, inside)
        return Recorded(graph, tensors, results)

    def _buffer(self, name: str, value: Value) -> Value:
        if name in LENGTHS:
            return value
        if not isinstance(value, Tensor):
            raise TargetError(f"{name}: is no tensor, and a graph cannot change it; run eagerly")
        shape = (value.shape[0], self.blocks) if name == TABLE else value.shape
        buffer = torch.zeros(shape, dtype=value.dtype, device=value.device)
        _fill(buffer, value)
        return buffer


def _count(values: Mapping[str, Value]) -> int:
    """The sequences of a step."""
    table = values[TABLE]
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
