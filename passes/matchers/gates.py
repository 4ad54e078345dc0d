"""What gates a layer's inner width: an activation of one half of a linear, times the other half."""

from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir.program import argument, is_call, tensor_type

ATEN = torch.ops.aten


def halves(activation: Node) -> Node | None:
    """The value [.., 2H] that gate and up are the halves of, where the gate comes first."""
    gate = argument(activation, 0)
    [product] = activation.users if len(activation.users) == 1 else [None]
    if product is None or not is_call(product, ATEN.mul.Tensor) or not is_call(gate, getitem):
        return None
    up = argument(product, 1) if product.args[0] is activation else argument(product, 0)
    parts = argument(gate, 0)
    if not is_call(up, getitem) or argument(up, 0) is not parts:
        return None
    if (gate.args[1], up.args[1]) != (0, 1):
        return None
    last = len(tensor_type(gate).shape) - 1
    if is_call(parts, ATEN.chunk.default):
        return argument(parts, 0) if parts.args[1:] in ((2, -1), (2, last)) else None
    if not is_call(parts, ATEN.split_with_sizes.default):
        return None
    sizes = parts.args[1]
    assert isinstance(sizes, list | tuple)
    even = len(sizes) == 2 and sizes[0] == sizes[1] and parts.args[2] in (-1, last)
    return argument(parts, 0) if even else None
