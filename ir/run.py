"""Run a program on real tensors, one node after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.program import Program, substitute

Value = object  # a tensor, a whole number, a list of whole numbers, or a tuple of these
Observe = Callable[[Node, Value], None]
Fetch = Callable[[Mapping[object, Value]], Sequence[Value]]
Kernel = Callable[..., Value]
Runner = Callable[[Program, Mapping[str, Value], Observe | None], list[Tensor]]


@torch.no_grad()
def run(
    program: Program, values: Mapping[str, Value], observe: Observe | None = None
) -> list[Tensor]:
    """The logits and the caches that a program gives.

    `values` has one entry for each placeholder, by name. `observe` sees each node that is
    computed with its value. A value is let go after its last use, as a compiled graph would.
    """
    return _Ready(program, {}).run(values, observe)


class Again:
    """`run` of programs that run many times and do not change: each is looked through once.

    `kernels` are called in place of the ops that they compute, without PyTorch's dispatcher. What
    `observe` sees are inference tensors, of which PyTorch keeps no books: they are not to be
    written to. What a program gives may be.
    """

    def __init__(self, kernels: Mapping[object, Kernel]) -> None:
        self.kernels = kernels
        self._ready: dict[int, _Ready] = {}  # which keep their programs, so that no id comes back

    def __call__(
        self, program: Program, values: Mapping[str, Value], observe: Observe | None = None
    ) -> list[Tensor]:
        """See `run`."""
        if id(program) not in self._ready:
            self._ready[id(program)] = _Ready(program, self.kernels)
        with torch.inference_mode():
            made = self._ready[id(program)].run(values, observe)
        return [x.clone() if x.is_inference() else x for x in made]  # no cache written in place is


@dataclass(frozen=True)
class _Call:
    """A node, and how its arguments are fetched from the values of others and from constants."""

    node: Node
    kernel: Kernel
    args: Fetch
    names: tuple[str, ...]
    kwargs: Fetch
    dead: Sequence[Node]  # which nobody needs afterwards


class _Ready:
    """A program looked through: nodes in order, with all that is the same in each run."""

    def __init__(self, program: Program, kernels: Mapping[object, Kernel]) -> None:
        self.program, self.kernels = program, kernels
        self.constants: dict[object, Value] = {}
        last, nodes = last_uses(program), list(program.graph.nodes)
        self.given = [node for node in nodes if node.op == "placeholder"]
        self.results = next((list(n.args[0]) for n in nodes if n.op == "output"), None)
        calls = [node for node in nodes if node.op == "call_function"]
        self.calls = [self._call(node, last.get(node, ())) for node in calls]

    def run(self, values: Mapping[str, Value], observe: Observe | None) -> list[Tensor]:
        """See the function of this name."""
        if self.results is None:
            raise IRError("the program", "has no output", "end it with `return [...]`")
        given = {node: _given(node, values) for node in self.given}
        env: dict[object, Value] = {**self.constants, **given}
        for call in self.calls:
            named = dict(zip(call.names, call.kwargs(env), strict=True)) if call.names else {}
            env[call.node] = call.kernel(*call.args(env), **named)
            if observe:
                observe(call.node, env[call.node])
            for dead in call.dead:
                del env[dead]
        return [env[item] for item in self.results]  # type: ignore[misc]

    def _call(self, node: Node, dead: Sequence[Node]) -> _Call:
        assert callable(node.target)
        kernel, kwargs = self.kernels.get(node.target, node.target), list(node.kwargs.values())
        args = self._fetch(node.args)
        return _Call(node, kernel, args, tuple(node.kwargs), self._fetch(kwargs), dead)

    def _fetch(self, args: Sequence[object]) -> Fetch:
        """What gives the values of arguments, in as few steps of Python as there can be."""
        if any(isinstance(arg, list | tuple) and _has_nodes(arg) for arg in args):
            return lambda env: [substitute(arg, env.__getitem__) for arg in args]
        keys = [arg if isinstance(arg, Node) else self._constant(arg) for arg in args]
        if len(keys) < 2:  # of one key, itemgetter gives no tuple
            return lambda env: [env[key] for key in keys]
        return itemgetter(*keys)

    def _constant(self, value: object) -> object:
        key = object()
        self.constants[key] = value
        return key


def _has_nodes(arg: object) -> bool:
    return isinstance(arg, Node) or (isinstance(arg, list | tuple) and any(map(_has_nodes, arg)))


def _given(node: Node, values: Mapping[str, Value]) -> Value:
    if node.name not in values:
        raise IRError(node.name, "has no value", "give one for each placeholder")
    return values[node.name]


def last_uses(program: Program) -> dict[Node, list[Node]]:
    """The nodes whose value nobody needs after each node."""
    last: dict[Node, Node] = {}
    for node in program.graph.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dead: dict[Node, list[Node]] = {}
    for node, at in last.items():
        dead.setdefault(at, []).append(node)
    return dead
