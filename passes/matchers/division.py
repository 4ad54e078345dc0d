"""What a rank may hold a part of: from linears of one input to the one linear that sums it up.

Linears that read one value (q, k and v; gate and up) give each rank a part of their outputs. What
is computed of these is followed, by a rule for each op, up to exactly one linear (o; down), which
takes its part of the inputs. Whatever has no rule, or mixes parts, leaves all of it whole.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch.fx import Node

from kvc8.ir import mixture_ops, ops
from kvc8.ir.program import Program, argument, is_cache, is_call, is_parameter, tensor_type
from kvc8.ir.types import Dim

ATEN = torch.ops.aten
LINEAR = (ops.quant_linear, ATEN.linear.default)
# Each value of the result is computed of the values in its place.
ELEMENTWISE = (
    *(ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.neg.default),
    *(ATEN.pow.Tensor_Scalar, ATEN.rsqrt.default, ATEN.to.dtype, ATEN.silu.default),
    *(ATEN.gelu.default, ATEN.sigmoid.default, ATEN.tanh.default, ATEN.relu.default),
    *(ops.quantize, ops.dequantize),
)


class Unfit(Exception):
    """Why something stays whole."""


@dataclass(frozen=True)
class Split:
    """A value of which each rank has a part: along `dim`, one of `of` parts.

    With fewer parts than ranks, neighboring ranks have the same one.
    """

    dim: int
    of: int


@dataclass
class Site:
    """What ranks have of their own between the linears that divide and the one that sums."""

    columns: list[Node]
    at: dict[Node, Split] = field(default_factory=dict)  # calls
    operands: dict[tuple[Node, Node], Split] = field(default_factory=dict)  # of a call, to divide
    rows: list[Node] = field(default_factory=list)


def groups(program: Program) -> list[list[Node]]:
    """The linears of a program, those of one module that read one value together."""
    found: dict[tuple[Node, str], list[Node]] = {}
    for linear in program.calls(*LINEAR):
        x = argument(linear, 0)
        x = argument(x, 0) if is_call(x, ops.quantize) else x
        module = str(linear.meta.get("origin", "")).rpartition(".")[0]
        found.setdefault((x, module), []).append(linear)
    return list(found.values())


def gives_logits(linear: Node) -> bool:
    """Whether a linear is the last one: what is computed of it reaches the output, and no other."""
    after = list(_after(linear))
    ends = any(user.op == "output" for node in (linear, *after) for user in node.users)
    experts = mixture_ops.grouped_linear, mixture_ops.dynamic_grouped_linear
    inner = (*LINEAR, *experts, ops.dynamic_linear, ops.paged_attention, ops.cache_write)
    return ends and not any(is_call(node, *inner) for node in after)


def divided(columns: list[Node], ranks: int) -> Site:
    """Follow what linears give to the one linear that takes it. Raises Unfit."""
    site = Site(columns)
    for linear in columns:
        site.at[linear] = _checked(linear, Split(_last(linear), _parts(linear, ranks)))
        for tensor in linear.all_input_nodes[1:]:
            site.operands[linear, tensor] = Split(0, site.at[linear].of)
    waiting = [user for linear in columns for user in _readers(linear)]
    heapq.heapify(waiting)  # in the order of the program, so that arguments come first
    while waiting:
        node = heapq.heappop(waiting)
        if node in site.at or node in site.rows:
            continue
        if is_call(node, *LINEAR):
            _take(site, node, ranks)
            continue
        site.at[node] = _checked(node, _rule(node, site))
        for user in _readers(node):
            heapq.heappush(waiting, user)
    if len(site.rows) != 1:
        raise Unfit(f"{len(site.rows)} linears take what it gives, and one can sum it up")
    return site


def _readers(node: Node) -> list[Node]:
    """The calls that read a call; of what the program gives back, only caches may be divided."""
    given = [user for user in node.users if user.op == "output"]
    if given and not is_call(node, ops.cache_write):
        raise Unfit(f"the program gives back {node.name}")
    return [user for user in node.users if user.op != "output"]


def check(size: Dim, of: int, what: str) -> None:
    """Raise Unfit where a size has not that many parts."""
    if not isinstance(size, int) or size % of:
        raise Unfit(f"{what} of {size} does not divide by {of}")


def _checked(node: Node, split: Split) -> Split:
    check(tensor_type(node).shape[split.dim], split.of, f"dimension {split.dim} of {node.name}")
    return split


def _last(node: Node) -> int:
    return len(tensor_type(node).shape) - 1


def _take(site: Site, row: Node, ranks: int) -> None:
    x = argument(row, 0)
    if site.at.get(x) != Split(_last(x), ranks):
        raise Unfit(f"{row.name} takes another dimension than the divided one")
    site.rows.append(row)
    site.operands[row, argument(row, 1)] = Split(1, ranks)


def _parts(linear: Node, ranks: int) -> int:
    """How many parts: one a rank, or for keys and values one a KV head where those are fewer."""
    writes = [node for node in _after(linear) if is_call(node, ops.cache_write)]
    if not writes:
        return ranks
    heads = int(tensor_type(writes[0]).shape[2])
    if heads % ranks and ranks % heads:
        raise Unfit(f"{heads} KV heads and {ranks} ranks do not divide one another")
    return min(heads, ranks)


def _after(linear: Node) -> Iterator[Node]:
    """What is computed of a linear, up to attentions, caches and linears, with these."""
    seen, waiting = {linear}, list(linear.users)
    ends = (ops.cache_write, ops.paged_attention, *LINEAR)
    while waiting:
        node = waiting.pop()
        if node in seen or node.op == "output":
            continue
        seen.add(node)
        yield node
        if not is_call(node, *ends):
            waiting.extend(node.users)


def _rule(node: Node, site: Site) -> Split:
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
    return site.at[x]


def _elementwise(node: Node, site: Site) -> Split:
    """The same place in every argument, counted from the last; what is broadcast there stays."""
    given = [x for x in node.all_input_nodes if x in site.at]
    places = {(site.at[x].dim - len(tensor_type(x).shape), site.at[x].of) for x in given}
    if len(places) != 1:
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
    a, b = (_dim(arg, node) for arg in node.args[1:3])
    return Split({a: b, b: a}.get(split.dim, split.dim), split.of)


def _unsqueeze(node: Node, site: Site) -> Split:
    split = _first(node, site)
    return Split(split.dim + (_dim(node.args[1], node) <= split.dim), split.of)


def _dim(arg: object, node: Node) -> int:
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
    if split.dim in [_dim(dim, x) for dim in dims]:
        raise Unfit(f"{node.name} goes along the divided dimension")
    if is_call(node, ATEN.mean.dim) and node.args[2] is not True:
        raise Unfit(f"{node.name} drops dimensions")
    return split


def _cat(node: Node, site: Site) -> Split:
    splits = {site.at.get(x) for x in node.all_input_nodes}
    [split, *others] = splits
    if split is None or others or split.dim == _dim(node.args[1], node):
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
        ATEN.cat.default: _cat,
        ops.cache_write: _cache_write,
        ops.paged_attention: _attention,
    }
)
