"""One layer of a program as boxes and edges, before or after a pass, with what the pass changed."""

import re
from collections import Counter
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Literal

from torch.fx import Node

from kvc8.ir import provenance
from kvc8.ir.program import Program, argument, is_cache, is_call, op_name, type_of
from kvc8.ir.types import show_type
from kvc8.passes.pipeline import Ran
from kvc8.tools.reporter.groups import merged

Mark = Literal["", "new", "gone", "changed"]
SIGNS: Mapping[Mark, str] = {"": "", "new": "+", "gone": "−", "changed": "~"}  # noqa: RUF001  a minus
OUTSIDE = "outside"
MOST = 400  # nodes that are drawn of a layer; a mixture of many experts has more
ROOM, OPERANDS, OPS = 30, 3, 4  # characters of a line; lines of operands; ops named of a group


@dataclass(frozen=True)
class Box:
    """A call, a cache, or a group of calls that the pass left alone."""

    kind: Literal["call", "cache", "group"]
    mark: Mark
    title: str
    lines: Sequence[str]
    nodes: Sequence[Node]


@dataclass
class Scene:
    """Boxes, and edges between their numbers; `left_out` nodes of the layer are not drawn."""

    boxes: list[Box] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    left_out: int = 0


def marks(ran: Ran) -> tuple[dict[Node, Mark], dict[Node, Mark]]:
    """What a pass did to each node before and after it; nodes that it left alone are left out.

    A node of the same name and op is the same node; it is "changed" where it has another type or
    expression or reads other parameters or constants.
    """
    hits = [remark.node for remark in ran.remarks if not remark.why_not]
    found = provenance.provenance(ran.before, ran.after, hits)
    old = {node.name: node for node in ran.before.graph.nodes}
    before: dict[Node, Mark] = dict.fromkeys(ran.before.graph.nodes, "gone")
    after: dict[Node, Mark] = {}
    for node in ran.after.graph.nodes:
        was = old.get(node.name)
        if was is None or (was.op, was.target) != (node.op, node.target):
            after[node] = "new" if node.op != "output" else ""
            continue
        mark: Mark = "" if node in found.kept and node not in found.changed else "changed"
        after[node] = before[was] = mark if node.op != "output" else ""
    return _marked(before), _marked(after)


def _marked(found: Mapping[Node, Mark]) -> dict[Node, Mark]:
    return {node: mark for node, mark in found.items() if mark}


def parts(program: Program) -> dict[str, list[Node]]:
    """The calls and caches of each layer, and of what lies outside of all: OUTSIDE."""
    found: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" or is_cache(node):
            found.setdefault(_part(node), []).append(node)
    return found


def _part(node: Node) -> str:
    """The layer that a node stands in: an item of a result with the result, a cache with its user.

    Nodes take the origin of the place that they were put at, which for items is another layer's
    where that one reads them.
    """
    while is_call(node, getitem):
        node = argument(node, 0)
    at = provenance.layer_of(next(iter(node.users), node) if is_cache(node) else node)
    return at if re.fullmatch(r"layer \d+", at) else OUTSIDE


def shape(nodes: Sequence[Node], marked: Mapping[Node, Mark]) -> Hashable:
    """What is equal for two layers if they are alike but for names."""
    at = {node: i for i, node in enumerate(nodes)}

    def one(arg: object) -> Hashable:
        if isinstance(arg, Node):
            return at[arg] if arg in at else (arg.op, type_of(arg), marked.get(arg, ""))
        return tuple(map(one, arg)) if isinstance(arg, tuple | list) else repr(arg)

    return tuple(
        (
            n.target if n.op == "call_function" else "",
            (type_of(n), marked.get(n, ""), _module(n)),
            tuple(map(one, n.args)),
            tuple((name, one(arg)) for name, arg in n.kwargs.items()),
        )
        for n in nodes
    )


def _module(node: Node) -> str:
    """The module within its layer that a node comes from."""
    return re.sub(r"^.*?\blayers\.\d+\.?", "", str(node.meta.get("origin", "")))


def scene(nodes: Sequence[Node], marked: Mapping[Node, Mark]) -> Scene:
    """Boxes for the nodes of one layer, which stand in the program's order.

    A cache that a pass left alone, a parameter, an input of the step and what comes from elsewhere
    are no boxes, but lines of those that read them.
    """
    drawn = [node for node in nodes if not is_cache(node) or node in marked][:MOST]
    at = {node: i for i, node in enumerate(drawn)}
    reads = [(at[arg], i) for node, i in at.items() for arg in node.all_input_nodes if arg in at]
    groups = merged([_label(node, marked) for node in drawn], reads)
    made = Scene(left_out=max(0, len(nodes) - MOST))
    number: dict[int, int] = {}
    for first in dict.fromkeys(groups):
        members = [node for node, group in zip(drawn, groups, strict=True) if group == first]
        number[first] = len(made.boxes)
        made.boxes.append(_box(members, marked, at))
    pairs = [(number[groups[a]], number[groups[b]]) for a, b in reads]
    made.edges = [(a, b) for a, b in dict.fromkeys(pairs) if a != b]
    return made


def _label(node: Node, marked: Mapping[Node, Mark]) -> str | None:
    """What nodes have in common that may be merged: attention, MLP or a norm."""
    if node in marked or is_cache(node):
        return None
    return _module(node).partition(".")[0]


def _box(members: Sequence[Node], marked: Mapping[Node, Mark], here: Container[Node]) -> Box:
    first = members[0]
    if is_cache(first):
        lines = [show_type(type_of(first))]
        return Box("cache", marked.get(first, ""), first.name, lines, members)
    around = [*_takes(members, marked, here), *_gives(members, here)]
    if len(members) > 1:
        title = _label(first, marked) or "outside of modules"
        return Box("group", "", title, [*_summary(members), *around], members)
    lines = [*_named(first), *_operands(first, marked, here), *around]
    return Box("call", marked.get(first, ""), called(first), lines, members)


def called(node: Node) -> str:
    """The op of a call, as short as it can be told from others."""
    assert callable(node.target)
    space = str(node.target).partition(".")[0]
    name = op_name(node.target)
    return f"{space}.{name}" if space in ("aten", "kvc8") else name


def _named(node: Node) -> Iterator[str]:
    type_ = show_type(type_of(node))
    if len(node.name) + len(type_) + 2 <= ROOM:
        yield f"{node.name}: {type_}"
    else:
        yield node.name
        yield type_


def _summary(members: Sequence[Node]) -> list[str]:
    counted = Counter(called(node).removeprefix("aten.") for node in members)
    names = [f"{count} {op}" if count > 1 else op for op, count in counted.most_common(OPS)]
    more = " …" if len(counted) > OPS else ""
    return [f"{len(members)} calls left alone", *wrapped([*names[:-1], names[-1] + more])]


def _operands(node: Node, marked: Mapping[Node, Mark], here: Container[Node]) -> list[str]:
    """Parameters, caches and inputs of the step, each with what the pass did to it."""
    read = [a for a in node.all_input_nodes if a.op == "placeholder" and a not in here]
    lines = wrapped([SIGNS[marked.get(a, "")] + short(a, node) for a in read])
    return lines if len(lines) <= OPERANDS else [*lines[: OPERANDS - 1], "…"]


def _takes(
    members: Sequence[Node], marked: Mapping[Node, Mark], here: Container[Node]
) -> Iterator[str]:
    """What is read of other layers."""
    read = [a for node in members for a in node.all_input_nodes]
    others = [a for a in dict.fromkeys(read) if a not in here and a.op == "call_function"]
    for part in dict.fromkeys(map(_part, others)):
        names = [SIGNS[marked.get(a, "")] + a.name for a in others if _part(a) == part]
        yield f"← {part}: {', '.join(names)}"


def short(parameter: Node, user: Node) -> str:
    """A parameter's name without the module of its user."""
    stem = str(user.meta.get("origin", "")).replace(".", "_")
    while stem:
        if parameter.name.startswith(f"{stem}_"):
            return parameter.name[len(stem) + 1 :]
        stem = stem.rpartition("_")[0]
    return parameter.name


def _gives(members: Sequence[Node], here: Container[Node]) -> list[str]:
    """Where results go that others read."""
    others = [u for node in members for u in node.users if u not in here]
    names = list(dict.fromkeys("results" if u.op == "output" else _part(u) for u in others))
    more = [f"{len(names) - 1} others"] if len(names) > 2 else names[1:]
    return [f"→ {', '.join([*names[:1], *more])}"] if names else []


def wrapped(words: Sequence[str]) -> list[str]:
    """Words joined by commas, in lines of ROOM characters."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 < ROOM:  # and a comma may follow
            lines[-1] = f"{lines[-1]}, {word}"
        else:
            lines.append(word)
    return [*(f"{line}," for line in lines[:-1]), *lines[-1:]]
