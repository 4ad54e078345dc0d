"""What a step of a lowered program costs: launches, bytes moved, operations, and time from these.

Bytes are what a kernel that reads each operand once and writes each result once must move:

    weights      parameters; of a table that rows are looked up in, the rows
    cache        pages read: of each sequence its context; rows written: of each token one
    activations  everything else, read once by each launch that takes it and written once

    sent         with several cards: what a collective sends from each card to the others

A step of decode takes one token of each of `batch` sequences, whose caches then hold `context`
tokens. A step of prefill takes `batch` prompts of `context` tokens, a chunk the last `chunk` tokens
of each. A program of several ranks is what one card does, so all of this is of each card. The time
of a launch is the longest of its bytes at the bandwidth, its operations at the rate, and what it
sends at the rate of the links: a bound from below. Nothing of it was measured: caches of the chip,
the overhead of launches, the latency of collectives and how kernels tile are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod

import torch
from torch.fx import Node

from kvc8.backends.npu.launches import is_launch
from kvc8.backends.workload import Device, Workload
from kvc8.ir import npu
from kvc8.ir.program import Program, is_call, is_parameter, op_name, type_of
from kvc8.ir.types import Dim, TensorType, Type, size

ATEN, C10D = torch.ops.aten, torch.ops._c10d_functional
# Each gives rows or a part of its first operand, or a copy, and reads no more than it gives.
LOOKUPS = (ATEN.embedding.default, ATEN.index.Tensor, ATEN.index_select.default)
PARTS = (ATEN.slice.Tensor, ATEN.select.int, ATEN.transpose.int, ATEN.split_with_sizes.default)
NEW = ATEN.new_empty.default  # memory for the results of a call
ATTENTION = (npu.npu_fused_infer_attention_score, npu.npu_incre_flash_attention)
BLOCKS, TOKENS = size("N"), size("T")


@dataclass(frozen=True)
class OpCost:
    """Of one launch, or of many."""

    launches: int = 0
    weights: int = 0  # bytes, as the next four
    cache_read: int = 0
    cache_written: int = 0
    read: int = 0  # activations
    written: int = 0
    int8_ops: int = 0
    half_ops: int = 0
    sent: int = 0  # bytes from a card to the others
    seconds: float = 0.0

    def __add__(self, other: "OpCost") -> "OpCost":
        return OpCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def bytes(self) -> int:
        """All bytes moved between a card and its memory."""
        return self.weights + self.cache_read + self.cache_written + self.read + self.written

    def at(self, device: Device, cards: int = 1) -> "OpCost":
        """The same with the time that one launch takes at least; cards send on all their links."""
        compute = self.int8_ops / device.int8 + self.half_ops / device.half
        links = self.sent / device.link / max(cards - 1, 1)
        return self + OpCost(seconds=max(self.bytes / device.bandwidth, compute, links))


@dataclass(frozen=True)
class StepSizes:
    """Puts numbers in place of named sizes."""

    phase: str
    workload: Workload

    def number(self, d: Dim) -> int:
        """A dimension as a number."""
        if isinstance(d, int):
            return d
        known = {s: self.workload.size(self.phase, str(s)) for s in d.free_symbols}
        return int(d.subs(known))

    def bytes(self, type_: Type) -> int:
        """The bytes of a tensor; caches, lists and numbers on the host count nothing here."""
        if isinstance(type_, tuple):
            return sum(map(self.bytes, type_))
        if not isinstance(type_, TensorType) or is_cache_type(type_):
            return 0
        return int(prod(map(self.number, type_.shape))) * type_.dtype.itemsize

    def row(self, type_: Type) -> int:
        """The bytes of one token in a cache [N, S, ...] or of NZ format."""
        assert isinstance(type_, TensorType)
        kept = [d for d in type_.shape if isinstance(d, int)]
        return prod(kept) * type_.dtype.itemsize


def is_cache_type(type_: Type) -> bool:
    """Whether a tensor is a cache, or a view of one: a dimension counts blocks."""
    dims = type_.shape if isinstance(type_, TensorType) else ()
    return any(BLOCKS in d.free_symbols for d in dims if not isinstance(d, int))


def costs(
    program: Program, phase: str, workload: Workload, device: Device
) -> Iterator[tuple[Node, OpCost]]:
    """Each launch of a step and what it costs."""
    sizes = StepSizes(phase, workload)
    for node in program.graph.nodes:
        if is_launch(node):
            yield node, _launch(node, sizes).at(device, workload.cards)


def by_op(program: Program, phase: str, workload: Workload, device: Device) -> Mapping[str, OpCost]:
    """The cost of each op in a step, those that move most first."""
    found: dict[str, OpCost] = {}
    for node, cost in costs(program, phase, workload, device):
        assert callable(node.target)
        name = op_name(node.target)
        found[name] = found.get(name, OpCost()) + cost
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def total(each: Mapping[str, OpCost]) -> OpCost:
    """The sum."""
    return sum(each.values(), OpCost())


def _launch(node: Node, sizes: StepSizes) -> OpCost:
    operands = node.all_input_nodes
    if node.target in (*LOOKUPS, *PARTS):
        return _some_rows(node, sizes)
    weights = sum(sizes.bytes(type_of(x)) for x in operands if _is_weight(x))
    made = sum(sizes.bytes(type_of(x)) for x in operands if is_call(x, NEW))  # and not read
    read = sum(sizes.bytes(type_of(x)) for x in operands if not _is_weight(x)) - made
    caches = [type_of(x) for x in operands if is_cache_type(type_of(x))]
    cost = OpCost(1, weights, read=read, written=_written(node, sizes) + made)
    if node.target in ATTENTION:
        return cost + _attention(node, caches, sizes)
    tokens = sizes.number(TOKENS)
    rows = sum(tokens * sizes.row(type_) for type_ in caches)
    sent = _sent(node, read, sizes.workload.cards)
    return cost + OpCost(cache_written=rows, sent=sent) + _matmul(node, sizes)


def _sent(node: Node, held: int, cards: int) -> int:
    """The bytes that a card must send of those that it holds: in a gather to each other card."""
    if node.target is C10D.all_reduce.default:
        return must_send(held, cards)
    return (cards - 1) * held if node.target is C10D.all_gather_into_tensor.default else 0


def must_send(held: int, cards: int) -> int:
    """The bytes that a card must send for a sum over cards of so many bytes on each.

    2*(n - 1)/n of them: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of
    workstations, 2009.
    """
    return -(-2 * (cards - 1) * held // cards)


def _is_weight(x: Node) -> bool:
    """Whether an operand is a parameter, seen through views of it."""
    while x.op == "call_function" and not is_launch(x) and x.all_input_nodes:
        x = x.all_input_nodes[0]
    return is_parameter(x)


def _written(node: Node, sizes: StepSizes) -> int:
    """The bytes of the results that somebody uses."""
    if not isinstance(type_of(node), tuple):
        return sizes.bytes(type_of(node))
    return sum(sizes.bytes(type_of(item)) for item in node.users if item.users)


def _some_rows(node: Node, sizes: StepSizes) -> OpCost:
    source, *others = node.all_input_nodes
    result = _written(node, sizes)
    index = sum(sizes.bytes(type_of(x)) for x in others)
    if is_cache_type(type_of(source)):
        return OpCost(1, cache_read=result, read=index, written=result)
    if _is_weight(source):
        return OpCost(1, weights=result, read=index, written=result)
    return OpCost(1, read=result + index, written=result)


def _attention(node: Node, caches: list[Type], sizes: StepSizes) -> OpCost:
    """Pages read, and products of queries with keys and of weights with values.

    A token sees what comes before it, of a prompt half of it on average. Of pages a window reads
    those that its table has; elsewhere its band is not taken into account: a bound from above.
    """
    tokens, seen = sizes.number(TOKENS), _seen(node, sizes)
    pages = sum(int(sizes.workload.batch * seen) * sizes.row(type_) for type_ in caches)
    query = type_of(node.all_input_nodes[0])
    assert isinstance(query, TensorType)
    width = prod(map(sizes.number, query.shape)) // tokens  # values of a token's query
    rope = node.kwargs.get("query_rope")  # more of them, that only keys meet
    both = 2 * width + (_values(rope, sizes) // tokens if isinstance(rope, Node) else 0)
    return OpCost(cache_read=pages, half_ops=int(2 * tokens * seen * both))


def _values(node: Node, sizes: StepSizes) -> int:
    type_ = type_of(node)
    assert isinstance(type_, TensorType)
    return prod(map(sizes.number, type_.shape))


def _seen(node: Node, sizes: StepSizes) -> float:
    """The tokens that a token of a step sees on average, itself among them."""
    context = sizes.workload.context
    table = node.kwargs.get("block_table")
    if isinstance(table, Node):
        type_ = type_of(table)
        assert isinstance(type_, TensorType)
        return min(context, sizes.number(type_.shape[1]) * sizes.workload.block_size)
    return context - (sizes.workload.new(sizes.phase) - 1) / 2


def _matmul(node: Node, sizes: StepSizes) -> OpCost:
    """Multiplications and additions of a product of matrices."""
    if node.target not in (npu.npu_quant_matmul, ATEN.linear.default, ATEN.matmul.default):
        return OpCost()
    x, weight = (type_of(operand) for operand in node.all_input_nodes[:2])
    assert isinstance(x, TensorType)
    assert isinstance(weight, TensorType)
    if node.target is ATEN.matmul.default:  # of each head, say, by its own weight
        return OpCost(half_ops=2 * prod(map(sizes.number, (*x.shape, weight.shape[-1]))))
    rows = prod(map(sizes.number, x.shape[:-1]))
    ops = 2 * int(rows * prod(map(sizes.number, weight.shape)))
    return OpCost(int8_ops=ops) if x.dtype is torch.int8 else OpCost(half_ops=ops)
