"""A program in two: up to the hidden states of all rows, and from there to logits.

An engine that wants the logits of rows that it chooses later, as those of a whole prompt, keeps the
hidden states and runs the head over what it asks for. The cut lies where the program takes the rows
of `logits_rows`; what comes after works on each row apart.
"""

import torch
from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.program import Program, is_call, is_parameter, tensor_type
from kvc8.ir.ranks import COLLECTIVES

ROWS, HIDDEN = "logits_rows", "hidden"
TAKES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)


def body(program: Program) -> Program:
    """The program without its head: gives hidden states, [1, T, C] or [T, C], and the caches.

    Raises IRError where a program does not choose rows once, by an index.
    """
    part = program.copy()
    taken = _taken(part)
    _give(part, [taken.args[0], *_results(part)[1:]])
    part.graph.eliminate_dead_code(_does_more)
    part.drop_unused_parameters()
    [rows] = [node for node in part.inputs() if node.name == ROWS]
    part.graph.erase_node(rows)
    return part


def head(program: Program) -> Program:
    """The rest: of the rows of `hidden`, as many as there are, logits [R, vocabulary].

    Raises IRError where a program does not choose rows once, or its head reads more than those.
    """
    part = program.copy()
    taken = _taken(part)
    hidden = part.placeholder(HIDDEN, tensor_type(taken))
    taken.replace_all_uses_with(hidden)
    _give(part, _results(part)[:1])
    needed = _needed(_output(part))
    for node in reversed(list(part.graph.nodes)):
        if node not in needed:
            part.graph.erase_node(node)
        elif node.op == "placeholder" and node is not hidden and not is_parameter(node):
            what = "is read after the rows of logits are chosen"
            raise IRError(node.name, what, "compile the model again")
    return part


def _output(program: Program) -> Node:
    output: Node = next(iter(reversed(program.graph.nodes)))
    return output


def _results(program: Program) -> list[object]:
    [results] = _output(program).args
    assert isinstance(results, list | tuple)
    return list(results)


def _give(program: Program, results: list[object]) -> None:
    """Let a program give something else."""
    _output(program).args = (results,)  # type: ignore[assignment]  # nodes, as it gave before


def _taken(program: Program) -> Node:
    """The rows that logits are wanted of."""
    users = [user for node in program.inputs() if node.name == ROWS for user in node.users]
    if len(users) != 1 or not is_call(users[0], *TAKES):
        what = "does not choose rows once, by an index"
        raise IRError(ROWS, what, "compile the model again")
    return users[0]


def _does_more(node: Node) -> bool:
    """Whether a node does more than give a value. All ranks alike leave a collective out."""
    return node.is_impure() and not is_call(node, *COLLECTIVES)


def _needed(output: Node) -> set[Node]:
    """A node and all that it is computed from."""
    found, waiting = {output}, [output]
    while waiting:
        new = [node for node in waiting.pop().all_input_nodes if node not in found]
        found.update(new)
        waiting += new
    return found
