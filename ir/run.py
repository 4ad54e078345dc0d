"""Run a program on real tensors, one node after the other."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.program import Program, substitute

Value = object  # a tensor, a whole number, a list of whole numbers, or a tuple of these
Observe = Callable[[Node, Value], None]
Runner = Callable[[Program, Mapping[str, Value], Observe | None], list[Tensor]]


@torch.no_grad()
def run(
    program: Program, values: Mapping[str, Value], observe: Observe | None = None
) -> list[Tensor]:
    """The logits and the caches that a program gives.

    `values` has one entry for each placeholder, by name. `observe` sees each node that is
    computed with its value. A value is let go after its last use, as a compiled graph would.
    """
    env: dict[Node, Value] = {}
    last = last_uses(program)
    for node in program.graph.nodes:
        if node.op == "output":
            return [env[item] for item in node.args[0]]  # type: ignore[misc]
        if node.op == "placeholder":
            env[node] = _given(node, values)
        else:
            args = [substitute(arg, env.__getitem__) for arg in node.args]
            kwargs = {name: substitute(arg, env.__getitem__) for name, arg in node.kwargs.items()}
            env[node] = node.target(*args, **kwargs)
            if observe:
                observe(node, env[node])
        for dead in last.get(node, ()):
            del env[dead]
    raise IRError("the program", "has no output", "end it with `return [...]`")


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
