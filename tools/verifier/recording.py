"""Run a program on recorded inputs, and keep what every node gave, rounded and not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.runtime import inputs as batch
from kvc8.backends.runtime.inputs import CPU, Rows
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Expression, Read, make
from kvc8.ir.precision.twins import Twins, make_exact
from kvc8.ir.program import Program, expression_of, substitute
from kvc8.ir.run import Value
from kvc8.ir.types import size

BLOCK, BLOCKS = 32, 4  # the smallest block that the NPU's attention takes with an int8 cache
TABLE = (2, 0, 3, 1)  # out of order, so that an order taken for granted shows
Hook = Callable[[Node, Value], Value]
State = dict[str, tuple[Tensor, Tensor]]  # caches by name, each with its twin


@dataclass(frozen=True)
class Feed:
    """The inputs of one call, and the cache slots written when it is done."""

    phase: str
    rows: Rows
    written: Tensor

    def inputs(self, program: Program) -> dict[str, Value]:
        """The inputs that a program takes."""
        names = [node.name for node in program.inputs()]
        return dict(batch.inputs([self.rows], BLOCK, CPU, False, names))


@dataclass
class Recording:
    """What a run gave: of each node its value, whose twin is in `twins`."""

    twins: Twins
    values: dict[Node, Value] = field(default_factory=dict)
    caches: State = field(default_factory=dict)
    results: list[Node] = field(default_factory=list)

    def twin(self, node: Node) -> Value:
        """What a node gave without rounding."""
        return self.twins.of(self.values[node])


@dataclass
class Parameters:
    """Parameters and their twins by expression, made once."""

    read: Read
    made: dict[Expression, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, expression: Expression) -> tuple[Tensor, Tensor]:
        """A parameter, and the same in float64."""
        if expression not in self.made:
            self.made[expression] = make(expression, self.read), make_exact(expression, self.read)
        return self.made[expression]


def feed(tokens: list[int], start: int = 0) -> Feed:
    """The tokens of one sequence from a position on."""
    slots = [TABLE[p // BLOCK] * BLOCK + p % BLOCK for p in range(start + len(tokens))]
    rows = Rows(tokens, start, TABLE)
    return Feed(rows.phase, rows, torch.tensor(slots))


def empty(program: Program) -> State:
    """Caches of zeros."""
    sizes = {size("N"): BLOCKS, size("S"): BLOCK}
    found = {}
    for cache in program.caches():
        type_ = cache.meta["type"]
        zeros = torch.zeros([int(sizes.get(d, d)) for d in type_.shape], dtype=type_.dtype)
        found[cache.name] = zeros, zeros.double() if type_.dtype.is_floating_point else zeros
    return found


@torch.no_grad()
def record(
    program: Program,
    parameters: Parameters,
    inputs: Mapping[str, Value],
    state: State,
    hook: Callable[["Recording"], Hook] | None = None,
) -> Recording:
    """Run a program once; what the hook gives for a node and its value takes the value's place."""
    made = Recording(Twins())
    change = hook(made) if hook else None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            made.values[node] = _given(node, parameters, inputs, state, made.twins)
        elif node.op == "output":
            made.results = list(node.args[0])
        else:
            args = [substitute(arg, made.values.__getitem__) for arg in node.args]
            kwargs = {k: substitute(v, made.values.__getitem__) for k, v in node.kwargs.items()}
            with made.twins:
                value = node.target(*args, **kwargs)
            made.values[node] = value
            made.values[node] = change(node, value) if change else value
    names = [cache.name for cache in program.caches()]
    last = made.results[len(made.results) - len(names) :]
    for name, result in zip(names, last, strict=True):
        cache = made.values[result]
        assert isinstance(cache, Tensor)
        made.caches[name] = cache, made.twins.twin(cache)
    return made


def _given(
    node: Node, parameters: Parameters, inputs: Mapping[str, Value], state: State, twins: Twins
) -> Value:
    if node.name in state:
        value, twin = (part.clone() for part in state[node.name])
    elif "expression" in node.meta:
        value, twin = parameters.of(expression_of(node))
    elif node.name in inputs:
        return inputs[node.name]
    else:
        raise IRError(node.name, "has no value", "give one for each placeholder")
    twins.pair(value, twin)
    return value
