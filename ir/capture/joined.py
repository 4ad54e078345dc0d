"""A tensor that a model fills part by part is the parts side by side.

    new_empty, then slice_scatter of each part until none is missing  ->  aten.cat of the parts

DeepSeek V3 and MiniCPM3 write K so: the channels of a latent, then those that are rotated. What is
filled in part, or by parts that lap over each other, stays as it is.
"""

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.program import is_call

ATEN = torch.ops.aten
NEW = (ATEN.new_empty.default, ATEN.empty.memory_format)
Part = tuple[int, int, Node]  # from where, to where, and what


def joined(node: Node) -> tuple[list[Node], int] | None:
    """The parts that an exported call has put side by side with its own, and along which dimension.

    None where the call is no slice_scatter, or the parts do not fill the tensor.
    """
    if not is_call(node, ATEN.slice_scatter.default):
        return None
    dim, parts, filled = _place(node)[0], list[Part](), node
    while is_call(filled, ATEN.slice_scatter.default):
        along, start, end = _place(filled)
        source = _whole(filled.args[1])
        if along != dim or source is None:
            return None
        parts.append((start, end, source))
        filled = filled.all_input_nodes[0]
    parts.sort(key=lambda part: part[:2])
    ends = [0, *(end for _, end, _ in parts)]
    side_by_side = [start for start, *_ in parts] == ends[:-1]
    if not side_by_side or ends[-1] != _shape(node)[dim] or not is_call(filled, *NEW):
        return None
    return [source for *_, source in parts], dim


def _place(node: Node) -> tuple[int, int, int]:
    """The dimension that a slice_scatter writes along, from where and to where."""
    shape = _shape(node)
    given = [*node.args[2:], *(0, None, None, 1)[len(node.args) - 2 :]]
    dim, start, end, step = given
    assert isinstance(dim, int)
    width = shape[dim]
    if step != 1 or not isinstance(width, int):
        return dim % len(shape), -1, -1
    first, last, _ = slice(start, end).indices(width)
    return dim % len(shape), first, last


def _whole(written: object) -> Node | None:
    """What is written, where a copy neither broadcasts nor casts it."""
    if not isinstance(written, Node) or not is_call(written, ATEN.copy.default):
        return written if isinstance(written, Node) else None
    source = written.args[1]
    if not isinstance(source, Node) or _shape(source) != _shape(written):
        return None
    return source if source.meta["val"].dtype is written.meta["val"].dtype else None


def _shape(node: Node) -> list[object]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return list(value.shape)
