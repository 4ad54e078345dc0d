"""One program for all ranks: what differs between them, one rank's program, and all at once.

All ranks run the same calls. They differ in the parameters whose expression says `shard(...)` or
`first(...)` (ir/expression.py), and so in what is computed of those, up to a collective, whose
result is the same on all. Binding a rank leaves neither in an expression, so whoever loads
parameters or runs a program knows nothing of ranks.
"""

import torch
import torch.distributed._functional_collectives  # has the shape rules of collectives
from torch.fx import Graph, Node
from torch.fx.node import Argument

from kvc8.ir import rank_ops
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Arg, Expression
from kvc8.ir.program import (
    Program,
    argument,
    expression_of,
    is_cache,
    is_call,
    is_parameter,
    substitute,
)
from kvc8.ir.shapes import Op

ATEN, C10D = torch.ops.aten, torch.ops._c10d_functional
GATHERS = (rank_ops.all_gather, C10D.all_gather_into_tensor.default)
TOGETHER = (rank_ops.all_reduce, C10D.all_reduce.default, *GATHERS)  # the same on all ranks
COLLECTIVES = (*TOGETHER, C10D.wait_tensor.default)


def bound(expression: Expression, rank: int) -> Expression:
    """An expression as one rank makes it: each `shard` a `slice`, each `first` decided."""
    args = tuple(_bound(arg, rank) for arg in expression.args)
    if expression.op == "shard":
        x, dim, size, *copies = args
        start = rank // _whole(copies[0] if copies else 1) * _whole(size)
        return Expression("slice", (x, dim, start, start + _whole(size)))
    if expression.op != "first":
        return Expression(expression.op, args)
    [x] = args
    assert isinstance(x, Expression)
    return x if rank == 0 else Expression("sub", (x, x))


def _bound(arg: Arg, rank: int) -> Arg:
    if isinstance(arg, tuple):
        return tuple(_bound(item, rank) for item in arg)
    return bound(arg, rank) if isinstance(arg, Expression) else arg


def _whole(arg: Arg) -> int:
    if not isinstance(arg, int):
        raise IRError("shard", f"{arg} is no whole number", "write shard(x, dim, size[, copies])")
    return arg


def of_rank(program: Program, rank: int) -> Program:
    """A copy whose parameters are those of one rank."""
    made = program.copy()
    for node in made.parameters():
        node.meta["expression"] = bound(expression_of(node), rank)
    return made


def each_ranks_own(program: Program) -> set[Node]:
    """The nodes whose value is not the same on all ranks.

    A cache is each rank's own where something that is goes into it, or is computed with it.
    """
    made = ((n, n.meta.get("expression")) for n in program.placeholders())
    found = {n for n, each in made if each is not None and each.differs and is_parameter(n)}
    if not found:
        return found
    count = -1
    while count != len(found):
        count = len(found)
        found |= _computed_of(program, found)
    return found


def _computed_of(program: Program, own: set[Node]) -> set[Node]:
    """What calls give that read something of `own`, and the caches that such a call reads."""
    found = set(own)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in TOGETHER:
            continue
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
            found.update(root for root in map(_unviewed, node.all_input_nodes) if is_cache(root))
    return found


def _unviewed(node: Node) -> Node:
    """What a node is computed of, as long as that is one value."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        [node] = node.all_input_nodes
    return node


def side_by_side(program: Program, ranks: int) -> Program:
    """All ranks as one program on one device: the CPU reference of a program with collectives.

    What differs between ranks stands once for each, under its name and `_rank0` and so on; a sum
    over ranks is a chain of additions, and the caches of a layer follow one another by rank. With
    one rank it is a copy.
    """
    if ranks == 1:
        return program.copy()
    return _SideBySide(program, ranks).made


class _SideBySide:
    """Writes a program out for all ranks."""

    def __init__(self, program: Program, ranks: int) -> None:
        self.own, self.ranks = each_ranks_own(program), ranks
        self.made = Program(Graph(), program.stage, program.shapes)
        self.of: dict[Node, list[Node]] = {}  # one node for all ranks, or one for each
        for node in program.graph.nodes:
            if node.op == "output":
                logits, *caches = [self.of[result] for result in node.args[0]]
                self.made.graph.output([logits[0], *(each for of in caches for each in of)])
            else:
                self.of[node] = list(self.copies(node))

    def copies(self, node: Node) -> list[Node]:
        """A node for all ranks, or for each."""
        if node.target in TOGETHER:
            return [self.together(node)]
        if is_call(node, C10D.wait_tensor.default):
            return self.of[argument(node, 0)]
        if node not in self.own:
            return [self.copy(node, 0, node.name)]
        return [self.copy(node, rank, f"{node.name}_rank{rank}") for rank in range(self.ranks)]

    def copy(self, node: Node, rank: int, name: str) -> Node:
        """A node as one rank has it."""

        def own(x: Node) -> Node:
            return self.of[x][rank if x in self.own else 0]

        target = name if node.op == "placeholder" else node.target
        args, kwargs = (
            substitute(node.args, own),
            {key: substitute(arg, own) for key, arg in node.kwargs.items()},
        )
        made = self.made.graph.create_node(node.op, target, args, kwargs, name)  # type: ignore[arg-type]
        made.meta = dict(node.meta)
        if is_parameter(node):
            made.meta["expression"] = bound(expression_of(node), rank)
        return made

    def together(self, node: Node) -> Node:
        """A collective, written out."""
        source = argument(node, 0)
        each = self.of[source] if source in self.own else self.of[source] * self.ranks
        if node.target in GATHERS:
            dim = -1 if node.target is rank_ops.all_gather else 0
            return self.call(node, ATEN.cat.default, (list(each), dim), node.name)
        total, *others = each
        for rank, part in enumerate(others, 1):
            name = node.name if rank == len(others) else f"{node.name}_to_rank{rank}"
            total = self.call(node, ATEN.add.Tensor, (total, part), name)
        return total

    def call(self, node: Node, op: Op, args: tuple[Argument, ...], name: str) -> Node:
        """A call in place of a collective, of whose origin it is."""
        made = self.made.append(op, args, {}, name)
        made.meta["origin"] = node.meta.get("origin", "")
        return made
