"""What the values of a whole model are on ranks, to hold the pass that divides it to its contract.

A node that each rank has a part of is compared with that part of the whole's value, and then takes
it, so that each call of each rank is judged by itself: a scale of another rank's heads is found
where it is used first. What each rank sums up alone stands for nothing in the whole model; the sum
over ranks does. Nor do codes that a rank makes of its part of a token by a scale of its own.
"""

import re
from collections.abc import Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.program import Program, argument, is_call, is_parameter, tensor_type, type_of
from kvc8.ir.provenance import Provenance, provenance
from kvc8.ir.types import TensorType
from kvc8.tools.verifier.recording import Recording

CHUNK = torch.ops.aten.chunk.default
OF_RANK = re.compile(r"(.+)_rank(\d+)")


def divided(before: Program, after: Program, ranks: int) -> tuple[Provenance, dict[Node, Node]]:
    """Of a whole program, and all ranks side by side: what stands for what, and of parts the whole.

    Parts stand for themselves, as `laid_out` puts the whole's values there.
    """
    kept, parts = provenance(before, after).kept, dict[Node, Node]()
    found = Provenance(kept, list(dict.fromkeys(_took(kept))))
    old = {node.name: node for node in before.graph.nodes}
    for node in after.graph.nodes:
        named = OF_RANK.fullmatch(node.name)
        was = old.get(named[1]) if named else None
        if was is None or is_parameter(node) or _is_of_own_scale(node, was):
            continue
        if _part(node, was, ranks):
            parts[node] = was
            found.kept[node] = node
    return found, parts


def _is_of_own_scale(node: Node, was: Node) -> bool:
    """Whether a value is what a rank makes of its own part of a token, by a scale of its own."""
    if not is_call(node, getitem) or not is_call(argument(node, 0), ops.quantize_tokens):
        return False
    mine, whole = (argument(argument(item, 0), 0) for item in (node, was))
    return tensor_type(mine).shape[-1] != tensor_type(whole).shape[-1]


def _took(kept: dict[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """What took the place of another, where a kept node or the output reads it as the logits."""
    for node, was in kept.items():
        new, old = node.all_input_nodes, was.all_input_nodes
        count = 1 if node.op == "output" else len(new)
        for a, b in zip(new[:count], old[:count], strict=True):
            same = kept.get(a) is b or type_of(a) != type_of(b) or OF_RANK.fullmatch(a.name)
            if not same:
                yield a, b


def _part(node: Node, was: Node, ranks: int) -> tuple[int, int, int] | None:
    """The dimension, start and size of a rank's part; None where a rank has no part of it.

    What is cut into sections, of each of which a rank has a part, is judged section by section.
    """
    if any(is_call(user, CHUNK) for user in node.users):
        return None
    mine, whole, named = type_of(node), type_of(was), OF_RANK.fullmatch(node.name)
    if not isinstance(mine, TensorType) or not isinstance(whole, TensorType) or named is None:
        return None
    pairs = enumerate(zip(mine.shape, whole.shape, strict=True))
    places = [(dim, int(a), int(b)) for dim, (a, b) in pairs if a != b]
    if len(places) != 1:
        return None
    [(dim, size, of)] = places
    copies = ranks * size // of  # neighboring ranks with the same part
    return dim, int(named[2]) // copies * size, size


def laid_out(old: Recording, parts: dict[Node, Node], ranks: int) -> Recording:
    """A recording of the whole program with the values of parts, and their caches, as well."""
    made = Recording(old.twins, dict(old.values), dict(old.caches), old.results)
    for node, was in parts.items():
        place, value = _part(node, was, ranks), old.values[was]
        assert place is not None
        assert isinstance(value, Tensor)
        mine = made.values[node] = value.narrow(*place)
        old.twins.pair(mine, old.twins.twin(value).narrow(*place))
        if was.name in old.caches:
            cache, twin = old.caches[was.name]
            made.caches[node.name] = cache.narrow(*place), twin.narrow(*place)
    return made
