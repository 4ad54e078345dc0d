"""Run programs as whole graphs of the device's graph engine (GE), which torchair makes of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from kvc8.ir.program import Program
from kvc8.ir.run import Observe, Value
from kvc8.tools.device_checker.machine import Engine


class GraphEngine:
    """Runs programs as `kvc8.ir.run.run` does; a graph is compiled for each call.

    A graph holds the lengths of sequences as numbers, and those change from step to step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @torch.no_grad()
    def __call__(
        self, program: Program, values: Mapping[str, Value], _: Observe | None = None
    ) -> list[Tensor]:
        """The logits and the caches that a program gives."""
        graph = with_numbers(program, values)
        given = [values[node.name] for node in graph.graph.nodes if node.op == "placeholder"]
        return list(self.engine(graph, given)(*given))


def with_numbers(program: Program, values: Mapping[str, Value]) -> GraphModule:
    """The program with its lists of numbers put in; tensors stay inputs."""
    graph = program.copy().graph
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if isinstance(values[node.name], Tensor):
            continue
        for user in list(node.users):
            _put(user, node, values[node.name])
        graph.erase_node(node)
    output = next(iter(reversed(graph.nodes)))
    output.args = (tuple(output.args[0]),)
    return GraphModule({}, graph)


def _put(user: Node, node: Node, value: Any) -> None:
    """Give a user the value of a node in the node's place."""

    def given(used: Node) -> Any:
        return value if used is node else used

    user.args = map_arg(user.args, given)
    user.kwargs = map_arg(user.kwargs, given)
