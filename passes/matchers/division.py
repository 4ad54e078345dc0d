"""What a rank may hold a part of: from linears of one input to the one linear that sums it up.

Linears that read one value (q, k and v; gate and up) give each rank a part of their outputs. What
is computed of these is followed, by a rule for each op, up to exactly one linear (o; down), which
takes its part of the inputs. Whatever has no rule, or mixes parts, leaves all of it whole. Of a
mixture of experts each rank has a part of every expert's inner width, and what is summed up is what
`combine` makes of the rows.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import mixture_ops, ops
from kvc8.ir.program import Program, argument, is_call, is_parameter, tensor_type
from kvc8.passes.matchers.division_rules import (
    CHUNK,
    GROUPED,
    Site,
    Split,
    Unfit,
    checked,
    dim_of,
    last_of,
    rule,
)
from kvc8.passes.matchers.heads import share_evenly

ATEN = torch.ops.aten
DYNAMIC = (ops.dynamic_linear, mixture_ops.dynamic_grouped_linear)  # with a scale a row of x
LINEAR = (ops.quant_linear, ops.dynamic_linear, ATEN.linear.default, *GROUPED)


def groups(program: Program) -> list[list[Node]]:
    """The linears of a program, those of one module that read one value together."""
    found: dict[tuple[Node, str], list[Node]] = {}
    for linear in program.calls(*LINEAR):
        x = argument(linear, 0)
        x = argument(x, 0) if is_call(x, ops.quantize) else x
        x = argument(argument(x, 0), 0) if _is_item_of(x, ops.quantize_tokens) else x
        module = str(linear.meta.get("origin", "")).rpartition(".")[0]
        found.setdefault((x, module), []).append(linear)
    return list(found.values())


def gives_logits(linear: Node) -> bool:
    """Whether a linear is the last one: what is computed of it reaches the output, and no other."""
    after = list(_after(linear))
    ends = any(user.op == "output" for node in (linear, *after) for user in node.users)
    inner = (*LINEAR, ops.paged_attention, ops.cache_write)
    return ends and not any(is_call(node, *inner) for node in after)


def _begun(columns: list[Node], ranks: int) -> Site:
    """A site of which the outputs of linears are divided."""
    site = Site(columns)
    for linear in columns:
        split = Split(last_of(linear), _parts(linear, ranks), _sections(linear))
        site.at[linear] = checked(linear, split)
        for tensor in linear.all_input_nodes[1:]:
            _take_part(site, linear, tensor, Split(outputs(linear), split.of, split.sections))
    return site


def _take_part(site: Site, linear: Node, tensor: Node, split: Split) -> None:
    """Let a linear take a part of a parameter, which may be transposed before it is read."""
    if is_parameter(tensor):
        site.operands[linear, tensor] = split
    elif is_call(tensor, ATEN.transpose.int) and is_parameter(argument(tensor, 0)):
        a, b = (dim_of(arg, tensor) for arg in tensor.args[1:3])
        site.at[tensor] = split
        inner = replace(split, dim={a: b, b: a}.get(split.dim, split.dim))
        site.operands[tensor, argument(tensor, 0)] = inner


def divided(columns: list[Node], ranks: int) -> Site:
    """Follow what linears give to the one linear that takes it. Raises Unfit."""
    site = _begun(columns, ranks)
    waiting = [user for linear in columns for user in _readers(linear)]
    heapq.heapify(waiting)  # in the order of the program, so that arguments come first
    while waiting:
        node = heapq.heappop(waiting)
        if node in site.at or node in site.rows:
            continue
        if is_call(node, *LINEAR):
            _take(site, node, ranks)
            continue
        if _is_own_scale(node, site):
            continue
        site.at[node] = checked(node, rule(node, site))
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


def outputs(linear: Node) -> int:
    """The dimension of outputs in a linear's weight, scale and bias; inputs are the next one."""
    return 1 if is_call(linear, *GROUPED) else 0


def weight_of(linear: Node) -> Node:
    """The weight of a linear of any kind."""
    return argument(linear, 2 if is_call(linear, *DYNAMIC) else 1)


def _sections(linear: Node) -> int:
    """Into how many pieces the outputs of a linear are cut, if that is all that reads them."""
    cuts = {u.args[1] for u in linear.users if is_call(u, CHUNK) and dim_of(u.args[2], linear) > 0}
    [count, *others] = cuts if all(is_call(u, CHUNK) for u in linear.users) and cuts else {1}
    return count if isinstance(count, int) and not others else 1


def _is_item_of(node: Node, op: Callable[..., object]) -> bool:
    return is_call(node, getitem) and is_call(argument(node, 0), op)


def _is_own_scale(node: Node, site: Site) -> bool:
    """Whether a value is the scale of a rank's own part of a token, which its own linear takes."""
    if not _is_item_of(node, ops.quantize_tokens) or node.args[1] != 1:
        return False
    codes = argument(node, 0)
    if site.at[codes].dim != last_of(argument(codes, 0)):
        return False
    if not all(is_call(user, *DYNAMIC) for user in node.users):
        raise Unfit(f"{node.name} is a scale of each rank's own, and no linear takes it")
    return True


def _take(site: Site, row: Node, ranks: int) -> None:
    x = argument(row, 0)
    if site.at.get(x) != Split(last_of(x), ranks):
        raise Unfit(f"{row.name} takes another dimension than the divided one")
    combined = [user for user in row.users if is_call(user, mixture_ops.combine)]
    if is_call(row, *GROUPED) and (len(combined) != 1 or len(row.users) != 1):
        raise Unfit(f"the rows of {row.name} are not combined at once")
    site.rows.append(row)
    _take_part(site, row, weight_of(row), Split(outputs(row) + 1, ranks))


def _parts(linear: Node, ranks: int) -> int:
    """How many parts: one a rank, or for keys and values one a KV head where those are fewer."""
    writes = [node for node in _after(linear) if is_call(node, ops.cache_write)]
    if not writes:
        return ranks
    heads = int(tensor_type(writes[0]).shape[2])
    if not share_evenly(heads, ranks):
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
