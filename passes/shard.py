"""Divide a model among ranks: each computes its heads and its part of the MLP, and they add up.

The linears of one input (q, k and v; gate and up) give each rank a part of their outputs, and the
linear that all of it flows into (o; down) takes that part of its inputs; one sum over ranks
follows. In between, heads, pages of the cache and KV scales are a rank's own. All ranks run this
one program; what `shard(...)` takes of a stored tensor is settled when a rank loads it. Where there
are fewer KV heads than ranks, neighboring ranks hold the same one. The embedding is divided along
its channels and lm_head along the vocabulary; both are gathered.

before:
    def quantized(
        x: f16[1, T, 64],
        s: f32[1] = stored("is"),
        g: i8[96, 64] = stored("g"),
        gd: f32[96] = float_bits(stored("gd")),
        gb: i32[96] = stored("gb"),
        d: i8[64, 96] = stored("d"),
        dd: f32[64] = float_bits(stored("dd")),
        db: i32[64] = stored("db"),
    ):
        x8: i8[1, T, 64] = kvc8.quantize(x, s, None)  # mlp.up_proj
        up: f16[1, T, 96] = kvc8.quant_linear(x8, g, gd, gb, f16)  # mlp.up_proj
        silu: f16[1, T, 96] = aten.silu(up)  # mlp
        h8: i8[1, T, 96] = kvc8.quantize(silu, s, None)  # mlp.down_proj
        down: f16[1, T, 64] = kvc8.quant_linear(h8, d, dd, db, f16)  # mlp.down_proj
        return [down]

after:
    def quantized(
        x: f16[1, T, 64],
        s: f32[1] = stored("is"),
        g: i8[48, 64] = shard(stored("g"), 0, 48),
        gd: f32[48] = float_bits(shard(stored("gd"), 0, 48)),
        gb: i32[48] = shard(stored("gb"), 0, 48),
        d: i8[64, 48] = shard(stored("d"), 1, 48),
        dd: f32[64] = float_bits(stored("dd")),
        db: i32[64] = stored("db"),
    ):
        x8: i8[1, T, 64] = kvc8.quantize(x, s, None)  # mlp.up_proj
        up: f16[1, T, 48] = kvc8.quant_linear(x8, g, gd, gb, f16)  # mlp.up_proj
        silu: f16[1, T, 48] = aten.silu(up)  # mlp
        h8: i8[1, T, 48] = kvc8.quantize(silu, s, None)  # mlp.down_proj
        int_linear: i32[1, T, 64] = kvc8.int_linear(h8, d)  # mlp.down_proj
        all_reduce: i32[1, T, 64] = kvc8.all_reduce(int_linear, 2)  # mlp.down_proj
        dequant_sum: f16[1, T, 64] = kvc8.dequant_sum(all_reduce, dd, db, f16)  # mlp.down_proj
        return [dequant_sum]

Exact, bit for bit: W8A8 linears, for an output takes no notice of the others, and int32 sums are
the same in any order, scaled once; what is done head by head or element by element; gathers. Equal
in real numbers: float linears, whose sums are taken in another order; and with `sums="half"` W8A8
ones, where each rank scales its own sums, the first adds the bias, and what is sent takes half the
bytes. The remark of a site says which of the two it is.

Within a bound: W8A8_DYNAMIC linears that take a part of their inputs, alone or of a mixture of
experts, as engines divide them. A rank's scale s_r = max|x_r| / 127 of its own part of a token is at
most the whole token's s, so that it is off by at most s/2 * sum_k |w[o, k]| as the whole one is, and
the two differ by at most s * sum_k |w[o, k]|; of a mixture, by the experts' weighted sum of that.

Left whole on every rank, with the reason: sites of which a size does not divide, whose values more
than one linear reads, or that an op without a rule takes part in (passes/matchers/division.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import mixture_ops, ops, rank_ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    expression_of,
    is_cache,
    is_call,
    is_parameter,
    tensor_type,
)
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.division import DYNAMIC, LINEAR, divided, gives_logits, weight_of
from kvc8.passes.matchers.division import groups as linears
from kvc8.passes.matchers.division_rules import Site, Split, Unfit, check
from kvc8.passes.matchers.heads import check_ranks
from kvc8.passes.rewrite import Contract, Remark, hit, miss, rewrite

ATEN = torch.ops.aten
INSIDE = ("cast", "float_bits")  # of these a part is one of what is inside, and reads as such
FLOAT = (ATEN.linear.default, mixture_ops.grouped_linear)
BIAS: Mapping[object, int] = MappingProxyType(  # which argument it is
    {
        ops.quant_linear: 3,
        ops.dynamic_linear: 4,
        ATEN.linear.default: 2,
        mixture_ops.grouped_linear: 2,
    }
)


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far a sum may be from what it was, where ranks have scales of their own: see above."""
    row = argument(old, 0) if is_call(old, mixture_ops.combine) else old
    if not is_call(row, *DYNAMIC):
        return torch.zeros(())
    scale, weight = look(argument(row, 1)).double(), look(weight_of(row)).double()
    size = weight.abs().sum(-1) * look(argument(row, 3)).double()
    if row is old:
        return scale[..., None] * size
    each = scale[..., None] * size[mixture_ops.owners(look(argument(row, 4)).long())]
    weights = look(argument(old, 2)).double().abs()
    summed: Tensor = mixture_ops.combine(each, look(argument(old, 1)).to(torch.int32), weights)
    return summed


@rewrite(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED, contract="real_exact", bound=bound)
def shard(
    program: Program, ranks: int = 2, sums: Literal["int32", "half"] = "int32"
) -> Iterator[Remark]:
    """See the module. `sums`, of W8A8 linears: "int32" or "half"."""
    attentions = program.calls(ops.paged_attention)
    check_ranks([(_heads(node), _heads(argument(node, 1))) for node in attentions], ranks)
    summed = set[Node]()
    for group in linears(program):
        if group[0] in summed:
            continue
        try:
            if gives_logits(group[0]):
                yield _gather(program, group[0], ranks)
                continue
            site = divided(group, ranks)
        except Unfit as why:
            yield miss(group[0], str(why))
            continue
        summed.update(site.rows)
        yield _divide(program, site, ranks, sums)
    for lookup in program.calls(ATEN.embedding.default):
        try:
            yield _gather(program, lookup, ranks)
        except Unfit as why:
            yield miss(lookup, str(why))


def _heads(node: Node) -> int:
    return int(tensor_type(node).shape[-2])


def _divide(program: Program, site: Site, ranks: int, sums: str) -> Remark:
    """Give every call of a site its part of its operands, and its type anew; then sum up."""
    together: dict[tuple[Node, Split], list[Node]] = {}
    for (node, operand), split in site.operands.items():
        together.setdefault((operand, split), []).append(node)
    for (operand, split), nodes in together.items():
        _take_part(program, operand, split, nodes, ranks)
    for node, split in sorted(site.at.items(), key=lambda item: item[0]):
        if is_call(node, ATEN.reshape.default):
            _reshape(node, split)
        node.meta["type"] = program.infer(node)
    [row] = site.rows
    exact = is_call(row, ops.quant_linear) and sums == "int32"
    total = _int32_sum(program, row, ranks) if exact else _float_sum(program, site, ranks)
    count = len(site.columns)
    note = (
        f"{count} linear{'s' * (count > 1)} and {row.name}, sums in {'int32' if exact else 'half'}"
    )
    if is_call(row, *DYNAMIC):
        return hit(
            total, f"{note}, each rank's part of a token by a scale of its own", "quantizing"
        )
    whole = exact and not any(is_call(linear, *FLOAT) for linear in site.columns)
    return hit(total, note, "bit_exact" if whole else "real_exact")


def _take_part(
    program: Program, operand: Node, split: Split, nodes: Sequence[Node], ranks: int
) -> None:
    """Let calls read a rank's part of a parameter or a cache."""
    type_ = tensor_type(operand)
    shape = list(type_.shape)
    size = int(shape[split.dim]) // split.of
    shape[split.dim] = size
    smaller = TensorType(type_.dtype, tuple(shape))
    if is_cache(operand):
        operand.meta["type"] = smaller
        return
    expression = _part(expression_of(operand), split, int(type_.shape[split.dim]), ranks)
    if set(operand.users) == set(nodes):
        operand.meta.update(type=smaller, expression=expression)
        return
    made = program.placeholder(f"{operand.name}_part", smaller, expression)
    for node in nodes:
        node.replace_input_with(operand, made)


def _part(expression: Expression, split: Split, size: int, ranks: int) -> Expression:
    """A rank's part of what an expression makes, whose `split` dimension has that size."""
    inner = expression.args[0] if expression.args else None
    if expression.op in INSIDE and isinstance(inner, Expression):
        return Expression(expression.op, (_part(inner, split, size, ranks), *expression.args[1:]))
    if split.sections > 1:
        one = replace(split, sections=1)
        parts = (
            _part(x, one, size // split.sections, ranks) for x in _cut(expression, split, size)
        )
        return Expression("concat", (tuple(parts), split.dim))
    copies = ranks // split.of
    shared = (copies,) if copies > 1 else ()
    return Expression("shard", (expression, split.dim, size // split.of, *shared))


def _cut(expression: Expression, split: Split, size: int) -> Iterator[Expression]:
    """The sections of a dimension, one an expression."""
    count, given = split.sections, expression.args[0] if expression.args else None
    if expression.op == "concat" and isinstance(given, tuple) and len(given) == count:
        yield from (part for part in given if isinstance(part, Expression))
        return
    for start in range(0, size, size // count):
        yield Expression("slice", (expression, split.dim, start, start + size // count))


def _reshape(node: Node, split: Split) -> None:
    shape = list(node.args[1])  # type: ignore[arg-type]
    if shape[split.dim] != -1:
        shape[split.dim] //= split.of
    node.update_arg(1, shape)


def _int32_sum(program: Program, row: Node, ranks: int) -> Node:
    """Add the int32 sums of all ranks, and scale them once."""
    x8, weight, deq_scale, bias, dtype = row.args
    own = program.call(row, rank_ops.int_linear, x8, weight)
    total = program.call(row, rank_ops.all_reduce, own, ranks)
    scaled = program.call(row, rank_ops.dequant_sum, total, deq_scale, bias, dtype)
    row.replace_all_uses_with(scaled)
    return scaled


def _float_sum(program: Program, site: Site, ranks: int) -> Node:
    """Add what the linear gives of each rank's part; the first rank's has the bias."""
    [row] = site.rows
    at = BIAS.get(row.target, len(row.args))
    bias = row.args[at] if len(row.args) > at else None
    if isinstance(bias, Node):
        first = Expression("first", (expression_of(bias),))
        row.update_arg(at, program.placeholder(f"{bias.name}_first", tensor_type(bias), first))
    return _collected(program, site.total, rank_ops.all_reduce, ranks)


def _gather(program: Program, node: Node, ranks: int) -> Remark:
    """A linear of a part of its outputs, or a lookup of a part of its channels; then all of them."""
    shape = tensor_type(node).shape
    if len(shape) != 3 or shape[0] != 1:
        raise Unfit(f"{node.name} is no [1, T, width]")
    check(shape[-1], ranks, f"the width of {node.name},")
    is_linear = is_call(node, *LINEAR)
    given = node.all_input_nodes[1:] if is_linear else [argument(node, 0)]
    operands = [tensor for tensor in given if is_parameter(tensor)]
    for operand in operands:
        _take_part(program, operand, Split(0 if is_linear else 1, ranks), [node], ranks)
    node.meta["type"] = program.infer(node)
    whole = _collected(program, node, rank_ops.all_gather, ranks)
    exact: Contract = "real_exact" if is_call(node, ATEN.linear.default) else "bit_exact"
    return hit(whole, "vocabulary divided" if is_linear else "channels divided", exact)


def _collected(program: Program, node: Node, op: torch._ops.OpOverload, ranks: int) -> Node:
    """What all ranks together make of a node, in its place."""
    made = program.call(node.next, op, node, ranks)
    made.meta["origin"] = node.meta.get("origin", "")
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made
