"""K's rows as they would be if a text stood elsewhere in the context.

Attention looks at distances, so a text computes the same wherever it begins, but RoPE turns its
keys by their positions: what is an extreme of one channel at position 100 is one of another channel
at position 1000. Calibration texts are short. From k_proj's output on, K is a function of that
output and the positions alone, and is computed again here with others.

What follows from the output alone is computed once a text, and what follows from positions alone
once for all layers and texts; at each place only what takes both is computed again. A short text
is put at several places at once, as a longer one whose positions are no sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.expression import make
from kvc8.ir.program import expression_of, is_call, is_parameter, substitute, type_of
from kvc8.ir.run import Value
from kvc8.ir.types import TensorType
from kvc8.tools.quantizer.sites import LINEAR

STILL = 0.1  # radians
ROWS = 512  # of K at a time, about: what they take stays in a processor's cache


@dataclass(frozen=True)
class Turning:
    """How a K cache's rows come from a linear's output: calls in order, and what they read."""

    source: Node  # k_proj's call
    positions: Node
    of_positions: Sequence[Node]  # calls that take no output
    of_output: Sequence[Node]  # calls that take no positions
    of_both: Sequence[Node]
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
    placed, made = _after(inputs[0], order), _after(sources[0], order)
    return Turning(
        sources[0],
        inputs[0],
        [node for node in order if node not in made],
        [node for node in order if node not in placed],
        [node for node in order if node in placed and node in made],
        parameters,
    )


def _after(node: Node, calls: Sequence[Node]) -> set[Node]:
    """The calls that take a node, by whatever way."""
    found = {node}
    for call in calls:
        if not found.isdisjoint(call.all_input_nodes):
            found.add(call)
    return found


@dataclass
class Table:
    """What follows from positions alone, at all positions below `count`, by its node.

    Only what meets an output is kept: cosines and sines, and not the angles. Of 131,072 positions
    and 128 channels in float32 they take 134 MB.
    """

    count: int
    values: dict[Node, Value] = field(default_factory=dict)

    def fill(self, turning: Turning, parameters: Mapping[Node, Value]) -> set[Node]:
        """Compute what is not known yet; gives what the turning reads of it, which is kept.

        So is what other layers read: theirs may be views of it, made by calls of their own.
        """
        known = {*turning.of_positions, turning.positions}
        read = {n for call in turning.of_both for n in call.all_input_nodes if n in known}
        missing = read - self.values.keys()
        for call in reversed(turning.of_positions):
            if call in missing:
                missing |= {n for n in call.all_input_nodes if n in known} - self.values.keys()
        env = {**parameters, **self.values, turning.positions: torch.arange(self.count)}
        _run([call for call in turning.of_positions if call in missing], env)
        kept = read | {node for node in missing if not known.issuperset(node.users)}
        self.values |= {node: env[node] for node in kept}
        return read

    def part(self, node: Node, starts: Sequence[int], tokens: int) -> Value:
        """A node's value for the positions of so many tokens from each start on."""
        value, type_ = self.values[node], type_of(node)
        if not isinstance(value, Tensor) or not isinstance(type_, TensorType):
            return value
        for dim, size in enumerate(type_.shape):
            if not isinstance(size, int):
                parts = [value.narrow(dim, start, tokens) for start in starts]
                return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        return value


def starts_of(tokens: int, positions: int, count: int) -> list[int]:
    """Where a text of so many tokens begins, `count` times, evenly over all positions."""
    last = max(positions - tokens, 0)
    return [round(last * i / (count - 1)) for i in range(count)]


def rows_at(
    turning: Turning,
    output: Tensor,
    starts: Sequence[int],
    weights: Mapping[Node, Tensor],
    read: Callable[[str], Tensor],
    table: Table,
) -> Iterator[Tensor]:
    """K's rows [n * T, heads, head_dim] of a text that begins at each of `starts`, n at a time.

    `output` [1, T, width] is what the linear gave for the text; `weights` has a layer's parameters,
    and `read` gives stored tensors for what all layers share. `table` reaches beyond the last row.
    """
    tokens = output.shape[1]
    many = min(max(ROWS // tokens, 1), len(starts))
    env: dict[Node, Value] = {turning.source: output.repeat(1, many, 1)}
    for node in turning.parameters:
        env[node] = weights[node] if node in weights else make(expression_of(node), read)
    placed = table.fill(turning, env)
    _run(turning.of_output, env)
    for i in range(0, len(starts), many):
        here = starts[i : i + many]
        padded = [*here, *[here[0]] * (many - len(here))]
        at = {node: table.part(node, padded, tokens) for node in placed}
        made = _run(turning.of_both, {**env, **at})
        assert isinstance(made, Tensor)
        yield made[: len(here) * tokens]


def _run(calls: Sequence[Node], env: dict[Node, Value]) -> Value:
    """Evaluate calls in order; gives the last one's value."""
    for call in calls:
        args = [substitute(arg, env.__getitem__) for arg in call.args]
        kwargs = {name: substitute(arg, env.__getitem__) for name, arg in call.kwargs.items()}
        assert callable(call.target)
        env[call] = call.target(*args, **kwargs)
    return env[calls[-1]] if calls else None


def hardly_turned(ends: Tensor) -> Tensor:
    """Which of K's channels, bool [C], RoPE turns by less than `STILL` between two places.

    `ends` [2, C] are the rows there of an output that is 1 in each channel. A pair (1, 1) turned by
    a small angle a is (1 - a, 1 + a).
    """
    first, last = ends
    still: Tensor = (last - first).abs() < STILL * first.abs()
    return still
