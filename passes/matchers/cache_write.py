"""What the passes that fuse a cache write share: their site, who reads a value, parameters by head."""

from operator import getitem

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import (
    Program,
    argument,
    expression_of,
    is_cache,
    is_call,
    tensor_type,
    unshaped,
)
from kvc8.ir.token_cache import is_steps
from kvc8.ir.types import TensorType

RESHAPE = torch.ops.aten.reshape.default


def codes_of(write: Node, mode: str, other: str) -> list[Node] | str:
    """The quantizers of K and V whose codes a write puts into pages, or why it cannot be fused.

    `mode` is the cache_mode that the fused op writes, and `other` the reason against any other.
    """
    codes = [unshaped(argument(write, i)) for i in (0, 1)]
    if is_steps(argument(write, 2)) or _of_tokens(codes[0]):
        return "its tokens have scales of their own"
    if not all(is_call(node, npu.npu_quantize) for node in codes):
        return "its rows are not quantized, for its cache is float"
    if write.kwargs.get("cache_mode") != mode:
        return other
    if not all(map(is_cache, (argument(write, 2), argument(write, 3)))):
        return "it writes to what is no input of the step"
    if argument(write, 4).op != "placeholder":  # it may come after the split, where the op goes
        return "its slots are no input of the step"
    if any(readers(node) != {write} for node in codes):
        return "what it quantizes is read beside the cache"
    return codes


def _of_tokens(codes: Node) -> bool:
    """Whether codes are an item of what quantizes tokens."""
    return is_call(codes, getitem) and is_call(argument(codes, 0), npu.npu_dynamic_quant)


def readers(node: Node) -> set[Node]:
    """What reads a value, through any number of reshapes."""
    found = set[Node]()
    for user in node.users:
        found |= readers(user) if is_call(user, RESHAPE) else {user}
    return found


def flat_angle(program: Program, flat: dict[Node, Node], turned: Node, index: int) -> Node:
    """The cosines (1) or sines (2) of a call of npu_rotary_mul as [T, D], once for all layers."""
    angle = argument(argument(turned, index), 0)
    if angle not in flat:
        width = int(tensor_type(angle).shape[-1])
        flat[angle] = program.call(angle.next, RESHAPE, angle, [-1, width])
        flat[angle].meta["origin"] = angle.meta.get("origin", "")
    return flat[angle]


def has_angles_of_tokens(turned: Node) -> bool:
    """Whether a call of npu_rotary_mul takes cosines and sines [1, T, 1, D]."""
    angles = [argument(turned, i) for i in (1, 2)]
    unsqueeze = torch.ops.aten.unsqueeze.default
    return all(is_call(angle, unsqueeze) and angle.args[1] == 2 for angle in angles)


def scale_of_heads(program: Program, quantizer: Node, kv_heads: int, dim: int) -> Node:
    """The scale of a call of npu_quantize as float32 [kv_heads, dim]."""
    return _of_heads(program, argument(quantizer, 1), kv_heads, dim)


def offset_of_heads(program: Program, quantizer: Node, kv_heads: int, dim: int) -> Node | None:
    """Its zero point likewise; None where it has none."""
    zero: Argument = quantizer.args[2]
    if not isinstance(zero, Node):
        return None
    made = _of_heads(program, zero, kv_heads, dim)
    made.meta["expression"] = cast(expression_of(made), torch.float32)
    return made


def _of_heads(program: Program, parameter: Node, kv_heads: int, dim: int) -> Node:
    expression = Expression("reshape", (expression_of(parameter), (kv_heads, dim)))
    type_ = TensorType(torch.float32, (kv_heads, dim))
    return program.placeholder(f"{parameter.name}_heads", type_, expression)
