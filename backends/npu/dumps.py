"""The values of a step, node by node: written on one machine, computed again on another.

A dump is a safetensors file. Of the first step of each phase it has

    PHASE/in/NAME     an input of the step, or a cache as the step found it; lists as int64
    PHASE/out/NAME    a cache as the step left it
    PHASE/NODE        what a node gave; NODE.0, NODE.1, ... where that is a tuple

`again` computes each node from what the dump says of its arguments, and not from what it computed
itself, so that one node's difference is not seen in all that follow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import Node

from kvc8.ir.checkpoint.safetensors_files import TensorFiles, read_header
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, is_cache, is_call, op_name, substitute, type_of
from kvc8.ir.run import Observe, Value, run
from kvc8.ir.types import IntsType


class ValueDump:
    """Runs programs as `kvc8.ir.run.run` does, and keeps the values of the first step of each."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self.phases = {id(program): phase for phase, program in programs.items()}
        self.tensors: dict[str, Tensor] = {}

    def __call__(
        self, program: Program, values: Mapping[str, Value], observe: Observe | None = None
    ) -> list[Tensor]:
        """The logits and the caches that a program gives."""
        phase = self.phases.pop(id(program), None)
        if phase is None:
            return run(program, values, observe)
        for node in (*program.inputs(), *program.caches()):
            self.keep(f"{phase}/in/{node.name}", values[node.name])

        def keep(node: Node, value: Value) -> None:
            self.keep(f"{phase}/{node.name}", value)
            if observe:
                observe(node, value)

        results = run(program, values, keep)
        for node, cache in zip(program.caches(), results[1:], strict=True):
            self.keep(f"{phase}/out/{node.name}", cache)
        return results

    def keep(self, name: str, value: Value) -> None:
        """Keep a copy of a value as it is now; whole numbers are not kept."""
        if isinstance(value, list) and all(isinstance(x, int) for x in value):
            value = torch.tensor(value, dtype=torch.int64)
        if isinstance(value, Tensor):
            self.tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        elif isinstance(value, tuple | list):
            for i, item in enumerate(value):
                self.keep(f"{name}.{i}", item)

    def write(self, path: Path) -> None:
        """Write what was kept. Raises TargetError where the file exists."""
        if path.exists():
            raise TargetError(str(path), "exists already", "choose another file or remove it")
        save_file(self.tensors, path)


@dataclass(frozen=True)
class Difference:
    """How what a node gave differs from what it gives here."""

    phase: str
    node: str
    op: str
    origin: str
    values: int
    differ: int
    most: float  # the largest difference; infinite where a dtype or shape differs


def read_dump(path: Path) -> dict[str, Tensor]:
    """The tensors of a dump. Raises ModelError where the file is damaged."""
    files = TensorFiles()
    return {name: files.read(stored) for name, stored in read_header(path).items()}


def again(
    phase: str, program: Program, dump: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Iterator[Difference]:
    """Compute each node of a phase from the dump's values, and compare; the caches come last.

    Raises TargetError where the dump is of another program.
    """
    values: dict[Node, Value] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _given(phase, node, dump, parameters)
        elif is_call(node, torch.ops.aten.new_empty.default):
            values[node] = _tensor(dump, f"{phase}/{node.name}")  # an op will write to it
        elif node.op == "call_function":
            yield from _once_more(phase, node, dump, values)
    for node in program.caches():
        cache = values[node]
        assert isinstance(cache, Tensor)
        yield _difference(phase, node, _tensor(dump, f"{phase}/out/{node.name}"), cache)


def _once_more(
    phase: str, node: Node, dump: Mapping[str, Tensor], values: dict[Node, Value]
) -> Iterator[Difference]:
    """Compute a node and compare it; puts into `values` what later nodes take for it."""
    args = substitute(node.args, values.__getitem__)
    kwargs = {name: substitute(x, values.__getitem__) for name, x in node.kwargs.items()}
    found = node.target(*args, **kwargs)  # type: ignore[misc, operator]
    if not node.users:
        return  # it wrote to its arguments; a device need not give what nobody reads
    kept = _kept(f"{phase}/{node.name}", found, dump)
    caches = [value for of, value in values.items() if is_cache(of)]
    values[node] = _told(kept, found, caches)
    for theirs, ours in zip(_leaves(kept), _leaves(found), strict=True):
        if theirs is not None and ours is not None:
            yield _difference(phase, node, theirs, ours)


def _given(
    phase: str, node: Node, dump: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Value:
    if node.name in parameters:
        return parameters[node.name]
    found = _tensor(dump, f"{phase}/in/{node.name}")
    if isinstance(type_of(node), IntsType):
        return found.tolist()
    return found.clone() if is_cache(node) else found  # ops write to it


def _tensor(dump: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in dump:
        raise TargetError(name, "is not in the dump", "give the dump of this very program")
    return dump[name]


def _kept(name: str, like: Value, dump: Mapping[str, Tensor]) -> Value:
    """What the dump has in place of a value that was computed here."""
    if isinstance(like, tuple | list):
        return tuple(_kept(f"{name}.{i}", item, dump) for i, item in enumerate(like))
    return _tensor(dump, name) if isinstance(like, Tensor) else None


def _told(kept: Value, found: Value, caches: list[Value]) -> Value:
    """What later nodes take: the dump's values, but views of caches, which stay views."""
    if isinstance(found, tuple | list):
        assert isinstance(kept, tuple)
        return tuple(_told(a, b, caches) for a, b in zip(kept, found, strict=True))
    if not isinstance(found, Tensor) or any(found._base is cache for cache in caches):
        return found
    return found if any(found is cache for cache in caches) else kept


def _leaves(value: Value) -> list[Tensor | None]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value if isinstance(value, Tensor) else None]


def _difference(phase: str, node: Node, theirs: Tensor, ours: Tensor) -> Difference:
    op = op_name(node.target) if callable(node.target) else "cache"
    where = phase, node.name, op, str(node.meta.get("origin", ""))
    if theirs.dtype is not ours.dtype or theirs.shape != ours.shape:
        return Difference(*where, ours.numel(), ours.numel(), float("inf"))
    gap = (theirs.double() - ours.double()).abs()
    gap = torch.where(theirs == ours, 0.0, gap.nan_to_num(nan=float("inf")))  # infinities agree
    return Difference(
        *where, gap.numel(), int((gap > 0).sum()), float(gap.max()) if gap.numel() else 0
    )
