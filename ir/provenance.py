"""Where the nodes of a program were before a pass: read off the graph, declared by no one.

A copy of a program keeps the names of its nodes, and fx never gives a name twice within a graph. So
a node of the same name, target and type is the same node after a pass: it was kept. Where a kept
node now reads N in the place where it read O, N took the place of O. A kept node that reads another
parameter or constant than before was changed; what it gives may differ until the changes of its
layer have met again. That is a region: all nodes on paths between the changed nodes of one layer
and the site its remark names. A cache of another name holds something else, and stands for none.

What a new node came from (`sources`) is read off in the same way: the nodes whose place it took;
for a parameter, whatever was made of the same stored tensors; else what the nodes that it feeds
came from.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.fx import Node

from kvc8.ir.expression import stored_names
from kvc8.ir.program import Program, expression_of, is_parameter

LAYER = re.compile(r"\.layers\.(\d+)\b|^layers\.(\d+)\b")


@dataclass
class Provenance:
    """What became of the nodes of a program; keys are nodes after the pass."""

    kept: dict[Node, Node] = field(default_factory=dict)
    took: list[tuple[Node, Node]] = field(default_factory=list)  # N and the O whose place it took
    changed: list[Node] = field(default_factory=list)
    inside: set[Node] = field(default_factory=set)  # of a region, where values may differ
    exits: list[Node] = field(default_factory=list)  # of regions: what they give


def layer_of(node: Node) -> str:
    """The layer that a node comes from: "layer 3", or its module, or its name."""
    origin = str(node.meta.get("origin", ""))
    found = LAYER.search(origin)
    return f"layer {found[1] or found[2]}" if found else origin or node.name


def provenance(before: Program, after: Program, sites: Iterable[str] = ()) -> Provenance:
    """Compare a program with what a pass made of its copy; `sites` are the names of its hits."""
    old = {node.name: node for node in before.graph.nodes}
    found = Provenance()
    for node in after.graph.nodes:
        if node.name in old and _same(node, old[node.name]):
            found.kept[node] = old[node.name]
    places = {node: list(_rewired(node, was, found.kept)) for node, was in found.kept.items()}
    found.changed = [node for node, pairs in places.items() if None in pairs]
    names = set(sites)
    _find_regions(found, [node for node in found.kept if node.name in names], places)
    seen = _of_other_caches(before, after)
    for node, pairs in places.items():
        for pair in pairs:
            if pair is not None and pair not in seen and node not in found.inside:
                seen.add(pair)
                found.took.append(pair)
    return found


def _of_other_caches(before: Program, after: Program) -> set[tuple[Node, Node]]:
    """What two programs give as caches that have other names, for they hold other things."""
    pairs = list(zip(after.caches(), before.caches(), strict=False))
    results = [program.graph.find_nodes(op="output")[0].args[0] for program in (after, before)]
    last = list(zip(*results, strict=False))[-len(pairs) :] if pairs else []
    together = zip(pairs, last, strict=False)
    return {given for (cache, was), given in together if cache.name != was.name}


def sources(before: Program, after: Program) -> dict[Node, tuple[Node, ...]]:
    """Of each node of `after` that is new, has another type or expression, or took another's place:
    the nodes of `before` it came from.

    In the order of either program. A node that feeds nothing which was there before has none.
    """
    old = {node.name: node for node in before.graph.nodes}
    here = {n: old[n.name] for n in after.graph.nodes if n.name in old and _calls(n, old[n.name])}
    found = {n: {here[n]} if n in here else set() for n in after.graph.nodes}
    for node, was in here.items():
        for a, b in zip(_leaves(node), _leaves(was), strict=False):
            if isinstance(a, Node) and isinstance(b, Node) and here.get(a) is not b:
                found[a].add(b)
    makers = _made_of(before)
    for node in reversed([n for n in after.graph.nodes if n not in here]):
        names = stored_names(expression_of(node)) if is_parameter(node) else ()
        alike = {maker for name in names for maker in makers.get(name, ())}
        through = {n for user in node.users if user not in here for n in found[user]}
        found[node] = found[node] or alike or through
    order = {node: i for i, node in enumerate(before.graph.nodes)}
    return {
        n: tuple(sorted(olds, key=order.__getitem__))
        for n, olds in found.items()
        if n not in here or len(olds) > 1 or not _same(n, here[n])
    }


def _made_of(program: Program) -> dict[str, list[Node]]:
    """The parameters and caches by the stored tensors they are made of."""
    found: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        for name in stored_names(node.meta["expression"]) if "expression" in node.meta else ():
            found.setdefault(name, []).append(node)
    return found


def _calls(node: Node, was: Node) -> bool:
    """Whether two nodes of one name are one node, whatever its type."""
    return (node.op, node.target) == (was.op, was.target) or node.op == was.op == "output"


def _same(node: Node, was: Node) -> bool:
    if node.op == was.op == "output":
        return True
    if not _calls(node, was):
        return False
    if node.meta.get("type") != was.meta.get("type"):
        return False
    return not is_parameter(node) or expression_of(node) == expression_of(was)


def _rewired(node: Node, was: Node, kept: dict[Node, Node]) -> Iterator[tuple[Node, Node] | None]:
    """The places of a kept node that changed: N and O, or None for a parameter or a constant."""
    mine, others = list(_leaves(node)), list(_leaves(was))
    more = len(mine) - len(others)
    if more and not (node.op == "output" and more > 0):  # which may end with new caches
        yield None
    for a, b in zip(mine, others, strict=False):
        if not isinstance(a, Node) or not isinstance(b, Node):
            if isinstance(a, Node) or isinstance(b, Node) or a != b:
                yield None
        elif kept.get(a) is not b:
            yield None if is_parameter(a) or is_parameter(b) else (a, b)


def _leaves(node: Node) -> Iterator[object]:
    for arg in (*node.args, *(node.kwargs[name] for name in sorted(node.kwargs))):
        yield from _flat(arg)


def _flat(arg: object) -> Iterator[object]:
    if isinstance(arg, tuple | list):
        for item in arg:
            yield from _flat(item)
    else:
        yield arg


def _find_regions(
    found: Provenance,
    sites: list[Node],
    places: dict[Node, list[tuple[Node, Node] | None]],
) -> None:
    groups: dict[str, list[Node]] = {}
    for node in found.changed:
        groups.setdefault(layer_of(node), []).append(node)
    for site in sites:
        if layer_of(site) in groups:
            groups[layer_of(site)].append(site)
    for group in groups.values():
        new = [
            pair[0] for node in group for pair in places[node] if pair and not _is_input(pair[0])
        ]
        region = _between([*group, *(node for node in new if node not in found.kept)])
        found.inside |= region
        found.exits += [node for node in region if any(user not in region for user in node.users)]


def _is_input(node: Node) -> bool:
    return node.op == "placeholder"


def _between(group: list[Node]) -> set[Node]:
    """The group and all nodes on a path from one of it to another."""
    down = _reach(group, lambda node: list(node.users))
    up = _reach(group, lambda node: node.all_input_nodes)
    return {node for node in down & up if node.op == "call_function"}


def _reach(group: list[Node], ways: object) -> set[Node]:
    assert callable(ways)
    seen, waiting = set(group), list(group)
    while waiting:
        for node in ways(waiting.pop()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen
