"""What the channels of a tensor are: of which tensors they are parts, put side by side."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir.program import argument, is_call, tensor_type

ATEN = torch.ops.aten
END = (1 << 63) - 1  # the end of a dimension, as a slice has it


@dataclass(frozen=True)
class Channels:
    """Channels [start, end) of the last dimension of `source`, of rank 4 as what they make up.

    Of `shared` ones all heads have the same: the source has one head, and was expanded.
    """

    source: Node
    start: int
    end: int
    shared: bool = False


def per_head(rows: Node) -> Node | None:
    """What rows [T, heads, channels] are but for a first dimension: [1, T, heads, channels]."""
    shape = tensor_type(rows).shape
    whole = argument(rows, 0) if is_call(rows, ATEN.reshape.default) else None
    return whole if whole is not None and tensor_type(whole).shape == (1, *shape) else None


def channels(node: Node) -> tuple[Channels, ...]:
    """The parts that make up the channels of [1, heads, T, channels] or [1, T, heads, channels].

    They are followed through what only picks, joins, or swaps heads and tokens.
    """
    if is_call(node, ATEN.transpose.int) and set(node.args[1:]) == {1, 2}:
        return channels(argument(node, 0))
    if is_call(node, ATEN.cat.default) and _is_last(node, node.args[1:]):
        return tuple(part for x in _listed(node.args[0]) for part in channels(x))
    if is_call(node, ATEN.expand.default) and 1 in tensor_type(argument(node, 0)).shape[1:3]:
        one = argument(node, 0)
        return (Channels(one, 0, int(tensor_type(one).shape[-1]), shared=True),)
    if is_call(node, ATEN.slice.Tensor) and _is_last(node, node.args[1:2]) and node.args[4:] == ():
        start = _number(node.args[2])
        width = int(tensor_type(node).shape[-1])
        return _between(channels(argument(node, 0)), start, start + width)
    if is_call(node, getitem) and is_call(
        split := argument(node, 0), ATEN.split_with_sizes.default
    ):
        sizes = [_number(size) for size in split.args[1]]  # type: ignore[union-attr]
        index = _number(node.args[1])
        if _is_last(node, split.args[2:]):
            start = sum(sizes[:index])
            return _between(channels(argument(split, 0)), start, start + sizes[index])
    return (Channels(node, 0, int(tensor_type(node).shape[-1])),)


def _is_last(node: Node, dim: Iterable[object]) -> bool:
    return [*dim] in ([-1], [len(tensor_type(node).shape) - 1])


def _listed(parts: object) -> list[Node]:
    assert isinstance(parts, list | tuple)
    return [part for part in parts if isinstance(part, Node)]


def _number(x: object) -> int:
    assert isinstance(x, int)
    return x


def _between(parts: Iterable[Channels], start: int, end: int) -> tuple[Channels, ...]:
    """Of channels the ones from `start` to `end`."""
    found, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(end - at, part.end - part.start)
        if low < high:
            found.append(replace(part, start=part.start + low, end=part.start + high))
        at += part.end - part.start
    return tuple(found)
