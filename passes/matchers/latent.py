"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): how to know it by its graph.

K of a head is channels that a weight of the head makes of a latent, beside channels that all heads
share and that are rotated; V is channels that another weight of the head makes of the same latent.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.program import argument, expression_of, is_call, is_parameter, tensor_type
from kvc8.passes.matchers.channels import Channels, channels, per_head

ATEN = torch.ops.aten
OTHER = "its K and V are not made of one latent by one linear"


@dataclass(frozen=True)
class ExpandedSite:
    """An attention whose cache holds K and V of each head, which are made of a latent.

    Of each head K has k channels of the latent's L, and R that all heads share; V has v of L.
    """

    attention: Node
    latent: Node  # [1, T, L] or [1, 1, T, L]
    shared: Node  # [1, 1, T, R] or [1, T, 1, R]
    weight: Node  # [heads * (k + v), L]: of each head the rows for K, then those for V
    query: tuple[Node, Node]  # [1, heads, T, k] and [1, heads, T, R]

    @property
    def writes(self) -> tuple[Node, Node]:
        """The calls that write K and V."""
        return argument(self.attention, 1), argument(self.attention, 2)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, k, v and L."""
        _, heads, v = tensor_type(self.attention).shape
        k, latent = (tensor_type(node).shape[-1] for node in (self.query[0], self.latent))
        return int(heads), int(k), int(v), int(latent)


def find_expanded(attention: Node) -> ExpandedSite | str | None:
    """The site of an attention over an expanded latent, or why it is none that can be folded.

    None where heads share no channels of K, as in any other attention.
    """
    writes = [argument(attention, 1), argument(attention, 2)]
    if not all(is_call(write, ops.cache_write) for write in writes):
        return None
    whole = [per_head(argument(write, 1)) for write in writes]
    k, v = (channels(x) if x is not None else () for x in whole)
    if not any(part.shared for part in k):
        return None
    if len(k) != 2 or len(v) != 1 or not _made_by_one_linear(k[0], v[0]) or not _is_shared(k[1]):
        return OTHER
    linear = argument(k[0].source, 0)
    if len(linear.args) > 2 and linear.args[2] is not None:
        return "its K and V are made of the latent by a linear with a bias"
    if any(expression_of(argument(write, 0)).args for write in writes):
        return "the checkpoint has scales for K and V of each head"
    if any(
        user.op != "output" for write in writes for user in write.users if user is not attention
    ):
        return "something else reads its cache too"
    query = _query(attention, int(tensor_type(argument(writes[0], 1)).shape[1]), k[0].end)
    if query is None:
        return "its query is not cut where its K is"
    return ExpandedSite(attention, argument(linear, 0), k[1].source, argument(linear, 1), query)


def _made_by_one_linear(k: Channels, v: Channels) -> bool:
    """Whether they are all that one linear by a parameter gives a head: K's, then V's."""
    source, width = k.source, int(tensor_type(k.source).shape[-1])
    if v.source is not source or not is_call(source, ATEN.reshape.default):
        return False
    linear = argument(source, 0)
    if not is_call(linear, ATEN.linear.default) or not is_parameter(argument(linear, 1)):
        return False
    _, tokens, heads, _ = tensor_type(source).shape
    in_order = tensor_type(linear).shape[-2:] == (tokens, heads * width)
    cut = (k.start, k.end, v.end) == (0, v.start, width)
    return in_order and cut and not k.shared and not v.shared


def _is_shared(part: Channels) -> bool:
    """Whether a part is all of what each head has."""
    return part.shared and (part.start, part.end) == (0, tensor_type(part.source).shape[-1])


def _query(attention: Node, heads: int, k: int) -> tuple[Node, Node] | None:
    """The two parts of the query, [1, heads, T, channels], where the first has k channels."""
    whole = per_head(argument(attention, 0))
    if whole is None or not is_call(whole, ATEN.transpose.int) or set(whole.args[1:]) != {1, 2}:
        return None
    joined = argument(whole, 0)
    parts = joined.args[0] if is_call(joined, ATEN.cat.default) else None
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    first, second = parts
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    found = tensor_type(first).shape
    return (first, second) if (found[1], found[-1]) == (heads, k) else None


def holds_latent(write: Node) -> bool:
    """Whether a call writes what attention reads as a part of each head's K: see the pass."""
    joined = [user for user in write.users if is_call(user, ATEN.cat.default)]
    return any(is_call(user, ops.paged_attention) for cat in joined for user in cat.users)


@dataclass(frozen=True)
class FoldedSite:
    """An attention to latents, as passes/fold_latent_attention.py leaves it.

    Of each of H heads the query has k channels that its weight makes L of, and R that are rotated.
    """

    attention: Node  # [T, H, L]
    latent: Node  # the call that writes the cache of [1, L] a token
    rope: Node  # the same of [1, R]
    query: tuple[Node, Node]  # [1, H, T, k] and [1, H, T, R]
    folded: Node  # the first of them as [1, H, T, L]
    for_k: Node  # a parameter [H, k, L]
    for_v: Node  # a parameter [H, L, v]
    out: Node  # what it gives by head, [T, H, v]


def find_folded(attention: Node) -> FoldedSite | None:
    """The site of an attention to latents; None for any other."""
    keys, latent = argument(attention, 1), argument(attention, 2)
    if not is_call(keys, ATEN.cat.default) or not is_call(latent, ops.cache_write):
        return None
    heads, width = (int(d) for d in tensor_type(attention).shape[1:])
    query = _query(attention, heads, width)
    rope = [part for part in keys.all_input_nodes if part is not latent]
    out = _by_head(attention)
    if query is None or out is None or len(rope) != 1 or not is_call(query[0], ATEN.matmul.default):
        return None
    folded, rotated = query
    for_v = argument(argument(out, 0), 1)
    for_k, unrotated = argument(folded, 1), argument(folded, 0)
    return FoldedSite(attention, latent, rope[0], (unrotated, rotated), folded, for_k, for_v, out)


def _by_head(attention: Node) -> Node | None:
    """What a weight a head makes of what was attended to, [T, heads, v]."""
    node = attention
    for op in (ATEN.transpose.int, ATEN.matmul.default, ATEN.transpose.int):
        taken = [user for user in node.users if is_call(user, op)]
        if len(node.users) != 1 or not taken:
            return None
        [node] = taken
    return node
