"""Find out which layers of a model are alike, so that one trace of each kind serves them all.

Layers are of one kind when they are built of the same modules, with the same settings and the
same parameter shapes (`fingerprint`), and the config says the same of both. Two layers of each kind
are traced, and stamping goes ahead only where the graphs of the two are isomorphic (`alike`):
whatever the model's code decides by a layer's position shows there.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch.fx import Node

SETTINGS = (int, float, str, bool, tuple, type(None))
POSITION = ("layer_idx", "layer_id")  # a layer's own number, which differs between like layers


@dataclass
class Segment:
    """The calls of one traced layer, what it takes of the layer before, and what it passes on."""

    nodes: list[Node] = field(default_factory=list)
    carry_in: Node | None = None
    carry_out: Node | None = None


@dataclass
class Cut:
    """A traced graph cut into what comes before the layers, the layers, and what comes after."""

    before: list[Node]
    layers: list[Segment]
    after: list[Node]


def fingerprint(layer: torch.nn.Module) -> tuple[object, ...]:
    """What a layer is made of: equal for two layers that run the same code on the same shapes."""
    return tuple(
        (name, type(module), _settings(module), _shapes(module))
        for name, module in layer.named_modules()
    )


def _settings(module: torch.nn.Module) -> tuple[object, ...]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, SETTINGS)}
    return tuple((k, v) for k, v in sorted(plain.items()) if k not in POSITION)


def _shapes(module: torch.nn.Module) -> tuple[object, ...]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)


def kinds(layers: Iterable[torch.nn.Module], settings: Iterable[object]) -> list[int]:
    """For each layer, the first layer of its kind; `settings` are what the config says of each."""
    first: dict[object, int] = {}
    made = zip(map(fingerprint, layers), settings, strict=True)
    return [first.setdefault(each, i) for i, each in enumerate(made)]


def representatives(kind_of: Sequence[int]) -> list[int]:
    """The first two layers of each kind, in the order of the model."""
    chosen = [i for k in set(kind_of) for i in _of_kind(kind_of, k)[:2]]
    return sorted(chosen)


def _of_kind(kind_of: Sequence[int], kind: int) -> list[int]:
    return [i for i, k in enumerate(kind_of) if k == kind]


def layer_of(node: Node, path: str) -> int | None:
    """Which layer of the module list at `path` made a node."""
    for name, _ in reversed(list(node.meta.get("nn_module_stack", {}).values())):
        if match := re.match(rf"{re.escape(path)}\.(\d+)(?:\.|$)", name):
            return int(match[1])
    return None


def cut(calls: Sequence[Node], path: str, count: int) -> Cut | None:
    """Cut the calls of a traced graph at its layers; None where they do not form a plain chain.

    Each layer may take one value from the layer before, any from before the layers, and none from
    elsewhere; a call of no layer between two of them must not depend on one.
    """
    made = Cut([], [Segment() for _ in range(count)], [])
    at: dict[Node, int] = {}
    for node in calls:
        layer = layer_of(node, path)
        depends = max((at.get(used, -1) for used in node.all_input_nodes), default=-1)
        at[node] = layer if layer is not None else count if depends >= 0 else -1
        _place(made, at[node]).append(node)
    chained = all(_link(made.layers[i], at, i) for i in range(count))
    loose = [
        used for node in made.after for used in node.all_input_nodes if at.get(used) in range(count)
    ]
    if not chained or any(used is not made.layers[-1].carry_out for used in loose):
        return None
    return made


def _place(made: Cut, at: int) -> list[Node]:
    if at < 0:
        return made.before
    return made.after if at == len(made.layers) else made.layers[at].nodes


def _link(segment: Segment, at: dict[Node, int], index: int) -> bool:
    """Find what a layer takes from the layer before and what it passes on."""
    taken = {used for node in segment.nodes for used in node.all_input_nodes if used in at}
    outside = [used for used in taken if at[used] != index]
    before = [used for used in outside if at[used] == index - 1 and index > 0]
    users = [(node, user) for node in segment.nodes for user in node.users if user in at]
    passed = {node for node, user in users if at[user] != index}
    if any(at[used] not in (-1, index - 1) for used in outside) or len(passed) != 1:
        return False
    segment.carry_out = passed.pop()
    if index == 0:
        return True
    segment.carry_in = before[0] if len(before) == 1 else None
    return segment.carry_in is not None


def alike(a: Segment, b: Segment, name_a: str, name_b: str) -> bool:
    """Whether the graphs of two layers are isomorphic, constants and types included."""
    graphs = _graph(a, name_a), _graph(b, name_b)
    matcher = nx.isomorphism.DiGraphMatcher(
        *graphs,
        node_match=lambda x, y: x["label"] == y["label"],
        edge_match=lambda x, y: x["places"] == y["places"],
    )
    return bool(matcher.is_isomorphic())


def _graph(segment: Segment, name: str) -> nx.DiGraph:
    """A layer as networkx sees it; edges carry the argument positions a value is used at."""
    graph, inside = nx.DiGraph(), set(segment.nodes)
    for node in segment.nodes:
        graph.add_node(node, label=_label(node))
        for place, used in enumerate(node.all_input_nodes):
            if used not in graph:
                graph.add_node(
                    used, label=_label(used) if used in inside else _outer(used, segment, name)
                )
            places = graph.edges[used, node]["places"] if graph.has_edge(used, node) else ()
            graph.add_edge(used, node, places=(*places, place))
    return graph


def _label(node: Node) -> str:
    """An op with its constants and type; the places of its values are on the edges."""
    numbered = {used: f"%{i}" for i, used in enumerate(dict.fromkeys(node.all_input_nodes))}
    args = torch.fx.node.map_arg((node.args, node.kwargs), numbered.__getitem__)
    return f"{node.target}{args}{_kind(node)}"


def _outer(node: Node, segment: Segment, name: str) -> str:
    if node is segment.carry_in:
        return "carry"
    return f"{node.name.replace(name, '#')}{_kind(node)}"


def _kind(node: Node) -> str:
    val = node.meta.get("val")
    return f"{val.dtype}{tuple(val.shape)}" if isinstance(val, torch.Tensor) else ""
