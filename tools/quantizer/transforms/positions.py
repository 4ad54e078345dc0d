"""K's rows as they would be if a text stood elsewhere in the context.

Attention looks at distances, so a text computes the same wherever it begins, but RoPE turns its
keys by their positions: what is an extreme of one channel at position 100 is one of another channel
at position 1000. Calibration texts are short. From k_proj's output on, K is a function of that
output and the positions alone, and is computed again here with others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.expression import make
from kvc8.ir.program import expression_of, is_call, is_parameter, substitute
from kvc8.ir.run import Value
from kvc8.tools.quantizer.sites import LINEAR

STILL = 0.1  # radians


@dataclass(frozen=True)
class Turning:
    """How a K cache's rows come from a linear's output: calls in order, and what they read."""

    source: Node  # k_proj's call
    positions: Node
    calls: Sequence[Node]
    parameters: Sequence[Node]


def find_turning(rows: Node) -> Turning | None:
    """The calls between a linear and `rows`; None where they do not read positions, or more."""
    calls: set[Node] = set()
    leaves: set[Node] = set()
    waiting = [rows]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" or is_call(node, LINEAR):
            leaves.add(node)
        elif node not in calls:
            calls.add(node)
            waiting += node.all_input_nodes
    parameters = [node for node in leaves if is_parameter(node)]
    sources = [node for node in leaves if is_call(node, LINEAR)]
    inputs = [node for node in leaves if node not in parameters and node not in sources]
    if len(sources) != 1 or [node.name for node in inputs] != ["positions"]:
        return None
    order = [node for node in rows.graph.nodes if node in calls]
    return Turning(sources[0], inputs[0], order, parameters)


def rows_at(
    turning: Turning,
    output: Tensor,
    starts: Sequence[int],
    weights: Mapping[Node, Tensor],
    read: Callable[[str], Tensor],
) -> Tensor:
    """K's rows [len(starts) * T, heads, head_dim] of a text that begins at each of `starts`.

    `output` [1, T, width] is what the linear gave for the text; `weights` has a layer's parameters,
    and `read` gives stored tensors for what all layers share.
    """
    tokens = output.shape[1]
    positions = torch.cat([torch.arange(start, start + tokens) for start in starts])
    env: dict[Node, Value] = {
        turning.source: output.repeat(1, len(starts), 1),
        turning.positions: positions,
    }
    for node in turning.parameters:
        env[node] = weights[node] if node in weights else make(expression_of(node), read)
    for call in turning.calls:
        args = [substitute(arg, env.__getitem__) for arg in call.args]
        kwargs = {name: substitute(arg, env.__getitem__) for name, arg in call.kwargs.items()}
        assert callable(call.target)
        env[call] = call.target(*args, **kwargs)
    rows = env[turning.calls[-1]]
    assert isinstance(rows, Tensor)
    return rows


def hardly_turned(ends: Tensor) -> Tensor:
    """Which of K's channels, bool [C], RoPE turns by less than `STILL` between two places.

    `ends` [2, C] are the rows there of an output that is 1 in each channel. A pair (1, 1) turned by
    a small angle a is (1 - a, 1 + a).
    """
    first, last = ends
    still: Tensor = (last - first).abs() < STILL * first.abs()
    return still
