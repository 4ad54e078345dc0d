"""How a value that ranks have parts of goes on through each op, and where it cannot.

A closed table: an op that is not in it leaves what it takes whole. See passes/matchers/division.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import getitem
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.ir import mixture_ops, ops
from kvc8.ir.program import argument, is_cache, is_call, is_parameter, tensor_type, type_of
from kvc8.ir.types import Dim, TensorType

ATEN = torch.ops.aten
CHUNK = ATEN.chunk.default
GROUPED = (mixture_ops.grouped_linear, mixture_ops.dynamic_grouped_linear)  # weight [E, out, in]
# Each value of the result is computed of the values in its place.
ELEMENTWISE = (
    *(ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.neg.default),
    *(ATEN.pow.Tensor_Scalar, ATEN.rsqrt.default, ATEN.to.dtype, ATEN.silu.default),
    *(
        ATEN.clamp.default,
        ATEN.gelu.default,
        ATEN.sigmoid.default,
        ATEN.tanh.default,
        ATEN.relu.default,
    ),
    *(ops.quantize, ops.dequantize),
)


class Unfit(Exception):
    """Why something stays whole."""


@dataclass(frozen=True)
class Split:
    """A value of which each rank has a part: along `dim`, one of `of` parts.

    With fewer parts than ranks, neighboring ranks have the same one. A dimension of several
    `sections`, as gate and up in one weight, gives a rank its part of each.
    """

    dim: int
    of: int
    sections: int = 1


@dataclass
class Site:
    """What ranks have of their own between the linears that divide and the one that sums."""

    columns: list[Node]
    at: dict[Node, Split] = field(default_factory=dict)  # calls
    operands: dict[tuple[Node, Node], Split] = field(default_factory=dict)  # of a call, to divide
    rows: list[Node] = field(default_factory=list)

    @property
    def total(self) -> Node:
        """What every rank gives a part of, to be summed up."""
        [row] = self.rows
        return next(iter(row.users)) if is_call(row, *GROUPED) else row


def check(size: Dim, of: int, what: str) -> None:
    """Raise Unfit where a size has not that many parts."""
    if not isinstance(size, int) or size % of:
        raise Unfit(f"{what} of {size} does not divide by {of}")


def checked(node: Node, split: Split) -> Split:
    """The same, where a call's result has so many parts. Raises Unfit."""
    if isinstance(type_of(node), TensorType):  # else what takes its items is checked
        of, what = split.of * split.sections, f"dimension {split.dim} of {node.name}"
        check(tensor_type(node).shape[split.dim], of, what)
    return split


def last_of(node: Node) -> int:
    """The number of a node's last dimension."""
    return len(tensor_type(node).shape) - 1


def rule(node: Node, site: Site) -> Split:
    """Along which dimension a call's result is divided, given what its arguments are."""
    if node.target in ELEMENTWISE:
        return _elementwise(node, site)
    if node.target not in RULES:
        raise Unfit(f"{node.name}: there is no rule for {node.target}")
    return RULES[node.target](node, site)


def _first(node: Node, site: Site) -> Split:
    x = argument(node, 0)
    if x not in site.at:
        raise Unfit(f"{node.name} reads all of {x.name}")
    if site.at[x].sections > 1 and not is_call(node, CHUNK):
        raise Unfit(f"{node.name} reads {x.name}, of which ranks have a part of each section")
    return site.at[x]


def _chunk(node: Node, site: Site) -> Split:
    """The sections of the divided dimension, one an item, or pieces of another."""
    split = _first(node, site)
    if split.sections == 1 and split.dim != dim_of(node.args[2], argument(node, 0)):
        return split
    if split.dim != dim_of(node.args[2], argument(node, 0)) or split.sections != node.args[1]:
        raise Unfit(f"{node.name} cuts other pieces than ranks have parts of")
    return replace(split, sections=1)


def _elementwise(node: Node, site: Site) -> Split:
    """The same place in every argument, counted from the last; what is broadcast there stays."""
    given = [x for x in node.all_input_nodes if x in site.at]
    places = {(site.at[x].dim - len(tensor_type(x).shape), site.at[x].of) for x in given}
    if len(places) != 1 or any(site.at[x].sections > 1 for x in given):
        raise Unfit(f"{node.name} takes values that are divided in different ways")
    [(place, of)] = places
    for other in node.all_input_nodes:
        shape = tensor_type(other).shape
        if other in site.at or len(shape) < -place or shape[place] == 1:
            continue
        if not is_parameter(other):
            raise Unfit(f"{node.name} reads all of {other.name}")
        site.operands[node, other] = Split(len(shape) + place, of)
    return Split(len(tensor_type(node).shape) + place, of)


def _transpose(node: Node, site: Site) -> Split:
    split = _first(node, site)
    a, b = (dim_of(arg, node) for arg in node.args[1:3])
    return Split({a: b, b: a}.get(split.dim, split.dim), split.of)


def _unsqueeze(node: Node, site: Site) -> Split:
    split = _first(node, site)
    return Split(split.dim + (dim_of(node.args[1], node) <= split.dim), split.of)


def dim_of(arg: object, node: Node) -> int:
    """The dimension of a node that an argument names, counted from the first."""
    assert isinstance(arg, int)
    return arg % len(tensor_type(node).shape)


def _reshape(node: Node, site: Site) -> Split:
    split, new = _first(node, site), tensor_type(node).shape
    before = math.prod(tensor_type(argument(node, 0)).shape[: split.dim])
    for dim, size in enumerate(new):
        if math.prod(new[:dim]) == before and size != 1:
            return Split(dim, split.of)
    raise Unfit(f"{node.name} mixes the divided dimension with others")


def _along_another(node: Node, site: Site) -> Split:
    """A slice, or a mean that keeps its dimensions, along other dimensions."""
    split, x = _first(node, site), argument(node, 0)
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    if is_call(node, ATEN.slice.Tensor) and _takes_turns(node, split):
        return split
    if split.dim in [dim_of(dim, x) for dim in dims]:
        raise Unfit(f"{node.name} goes along the divided dimension")
    if is_call(node, ATEN.mean.dim) and node.args[2] is not True:
        raise Unfit(f"{node.name} drops dimensions")
    return split


def _takes_turns(node: Node, split: Split) -> bool:
    """Whether a slice takes every other value along the divided dimension, to its end."""
    x, dim = argument(node, 0), dim_of(node.args[1], argument(node, 0))
    start, end, step = (*node.args[2:], 1)[:3]
    if not isinstance(start, int) or not isinstance(end, int) or not isinstance(step, int):
        return False
    size = tensor_type(x).shape[dim]
    if dim != split.dim or not 0 <= start < step or not isinstance(size, int) or size > end:
        return False
    check(size, split.of * step, f"dimension {dim} of {x.name}, taken in turns of {step},")
    return True


def _cat(node: Node, site: Site) -> Split:
    splits = {site.at.get(x) for x in node.all_input_nodes}
    [split, *others] = splits
    if split is None or others or split.dim == dim_of(node.args[1], node):
        raise Unfit(f"{node.name} joins values along the divided dimension")
    return split


def _cache_write(node: Node, site: Site) -> Split:
    split, cache = site.at.get(argument(node, 1)), argument(node, 0)
    if split is None or split.dim != 1 or not is_cache(cache) or len(cache.users) != 1:
        raise Unfit(f"{node.name} writes other than heads")
    site.operands[node, cache] = Split(2, split.of)
    return Split(2, split.of)


def _attention(node: Node, site: Site) -> Split:
    q, k, v = (site.at.get(argument(node, i)) for i in range(3))
    if q is None or q.dim != 1 or k is None or k != v or k.dim != 2:
        raise Unfit(f"{node.name} takes other than divided heads")
    if isinstance(sinks := node.args[9], Node):
        site.operands[node, sinks] = Split(0, q.of)
    return q


RULES: Mapping[object, Callable[[Node, Site], Split]] = MappingProxyType(
    {
        ATEN.transpose.int: _transpose,
        ATEN.unsqueeze.default: _unsqueeze,
        ATEN.reshape.default: _reshape,
        ATEN.slice.Tensor: _along_another,
        ATEN.mean.dim: _along_another,
        CHUNK: _chunk,
        getitem: _first,
        ops.quantize_tokens: _first,
        ATEN.cat.default: _cat,
        ops.cache_write: _cache_write,
        ops.paged_attention: _attention,
    }
)
