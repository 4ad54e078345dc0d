"""RoPE as a captured program has it: how it pairs the channels of a head, and what it rotates."""

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Arg, Expression
from kvc8.ir.program import argument, is_call, tensor_type

ATEN = torch.ops.aten
MOVES = (ATEN.reshape.default, ATEN.transpose.int, ATEN.unsqueeze.default, ATEN.to.dtype)
LINEAR = (ATEN.linear.default, ops.quant_linear)


@dataclass(frozen=True)
class Rope:
    """How RoPE pairs the channels of a head: `half` pairs i with i + distance, `next` 2i with 2i+1.

    Channels from `width` on are not rotated. `source` is what is rotated, by cos and sin that were
    multiplied by `factor`.
    """

    kind: str
    distance: int
    width: int
    source: Node
    factor: float = 1.0

    def bound(self, scale: Arg, zero: Arg) -> Expression:
        """Scales [H, D] that hold after RoPE, given scales and zero points measured before it."""
        factor = () if self.factor == 1.0 else (self.factor,)
        pairs = (self.distance, self.width, self.kind, *factor)
        return Expression("rope_bound", (scale, zero, *pairs))


def find_rope(rows: Node) -> Rope | None:
    """The rotation that gave `rows`, [T, H, D]; None where there is none."""
    node = behind(rows)
    if is_call(node, ATEN.cat.default):  # rotated channels, then those that pass
        parts = node.args[0]
        assert isinstance(parts, list | tuple)
        inner = find_rope(parts[0]) if isinstance(parts[0], Node) else None
        return inner and replace(inner, source=_unsliced(inner.source))
    if not is_call(node, ATEN.add.Tensor):
        return None
    for product in node.all_input_nodes:
        factors = product.all_input_nodes if is_call(product, ATEN.mul.Tensor) else []
        for i, factor in enumerate(factors):
            if rope := _rotated(behind(factor)):
                return replace(rope, factor=_constant_factor(factors[1 - i]))
    return None


def _constant_factor(sine: Node) -> float:
    """The number that cos and sin were multiplied by on their way here."""
    factor, node = 1.0, sine
    while len(node.all_input_nodes) == 1 and not is_call(node, ATEN.sin.default, ATEN.cos.default):
        if is_call(node, ATEN.mul.Tensor) and isinstance(node.args[1], int | float):
            factor *= abs(node.args[1])
        node = node.all_input_nodes[0]
    return factor


def _rotated(node: Node) -> Rope | None:
    """What `rotate_half` turns: the second half negated, then the first; or every other channel."""
    if not is_call(node, ATEN.cat.default, ATEN.stack.default):
        return None
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or not is_call(parts[0], ATEN.neg.default):
        return None
    second, first = argument(parts[0], 0), parts[1]  # type: ignore[arg-type]
    if not is_call(first, ATEN.slice.Tensor) or not is_call(second, ATEN.slice.Tensor):
        return None
    source = argument(second, 0)
    width = int(tensor_type(source).shape[-1])
    if is_call(node, ATEN.stack.default):
        return Rope("next", 1, width, source)
    return Rope("half", width // 2, width, source)


def behind(node: Node) -> Node:
    """What a value was before it was moved about."""
    while is_call(node, *MOVES):
        node = argument(node, 0)
    return node


def _unsliced(node: Node) -> Node:
    return argument(node, 0) if is_call(node, ATEN.slice.Tensor) else node


def from_linear(source: Node) -> bool:
    """Whether a value comes out of a linear, but for a bias, and nothing changed it since."""
    node = behind(source)
    while is_call(node, ATEN.slice.Tensor, ATEN.split.Tensor, ATEN.add.Tensor):
        node = behind(argument(node, 0))
    return node.op == "placeholder" or is_call(node, *LINEAR)
