"""What several calls become at once in the flavor `gqa`, where ONNX Runtime has one op.

    weight * (x * rsqrt(mean(x^2) + e))                     RMSNormalization
    x*cos + [-x_high, x_low]*sin, halves of cos/sin equal   RotaryEmbedding
    quant_linear                                            com.microsoft.MatMulIntegerToFloat

Each is equal in real numbers and rounds at other places. What the fused call leaves without users
is dropped from the model. Anything that is not quite so is computed call by call.
"""

import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import END, Builder, Value
from kvc8.backends.onnx.products import point
from kvc8.backends.onnx.quantization import operands, quant_linear
from kvc8.ir.program import argument, is_call, tensor_type

aten = torch.ops.aten
F32 = torch.float32


def rms_norm(b: Builder, node: Node) -> Value | None:
    """The float32 norm over the last dimension that a product ends; None where it ends none."""
    for weight, normed in (node.args[:2], node.args[1::-1]):
        found = _normed(normed)
        if found is None or not isinstance(weight, Node):
            continue
        x, epsilon = found
        width = tensor_type(x).shape[-1]
        if tensor_type(node).dtype is F32 and tensor_type(weight).shape == (width,):
            scale = b.value(weight)
            return b.op("RMSNormalization", b.value(x), scale, axis=-1, epsilon=epsilon)
    return None


def _normed(node: object) -> tuple[Node, float] | None:
    """The x and the epsilon of x * rsqrt(mean(x^2) + epsilon)."""
    if not isinstance(node, Node) or not is_call(node, aten.mul.Tensor):
        return None
    x, root = node.args[:2]
    if (
        not isinstance(x, Node)
        or not isinstance(root, Node)
        or not is_call(root, aten.rsqrt.default)
    ):
        return None
    total = argument(root, 0)
    mean = total.args[0]
    if not is_call(total, aten.add.Tensor) or not is_call(mean, aten.mean.dim) or total.kwargs:
        return None
    assert isinstance(mean, Node)
    square, epsilon = argument(mean, 0), total.args[1]
    same = is_call(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
    if same and mean.args[1:] == ([-1], True) and isinstance(epsilon, float):
        return x, epsilon
    return None


def rotary(b: Builder, node: Node) -> Value | None:
    """The rotation that a sum ends, of x [1, heads, T, dim]; None where it ends none."""
    straight, crossed = node.args[:2]
    if not is_call(straight, aten.mul.Tensor) or not is_call(crossed, aten.mul.Tensor):
        return None
    assert isinstance(straight, Node)
    assert isinstance(crossed, Node)
    x, turned = argument(straight, 0), argument(crossed, 0)
    shape = tensor_type(x).shape
    tables = [_table(product.args[1]) for product in (straight, crossed)]
    if len(shape) != 4 or tensor_type(node).dtype is not F32 or not _crosses(turned, x):
        return None
    if tables[0] is None or tables[1] is None:
        return None
    half = int(shape[3]) // 2
    halves = [b.op("Slice", b.value(table), [0], [half], [-1]) for table in tables if table]
    return b.op("RotaryEmbedding", b.value(x), *halves)


def _crosses(node: Node, x: Node) -> bool:
    """Whether a node is [-x_high, x_low]."""
    if not is_call(node, aten.cat.default) or node.args[1:] != (-1,):
        return False
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    half = int(tensor_type(x).shape[-1]) // 2
    if len(parts) != 2 or not is_call(parts[0], aten.neg.default):
        return False
    assert isinstance(parts[0], Node)
    high, low = argument(parts[0], 0), parts[1]
    slices = is_call(high, aten.slice.Tensor) and is_call(low, aten.slice.Tensor)
    assert isinstance(low, Node)
    return slices and high.args == (x, 3, half, END) and low.args == (x, 3, 0, half)


def _table(node: object) -> Node | None:
    """The cosines or sines [1, T, dim] of a table [1, 1, T, dim] whose two halves are equal."""
    if not is_call(node, aten.unsqueeze.default):
        return None
    assert isinstance(node, Node)
    table = argument(node, 0)
    inner = table
    while is_call(inner, aten.mul.Tensor, aten.to.dtype) and not isinstance(inner.args[1], Node):
        inner = argument(inner, 0)
    if node.args[1] != 1 or not is_call(inner, aten.cos.default, aten.sin.default):
        return None
    cat = argument(inner, 0)
    if not is_call(cat, aten.cat.default):
        return None
    parts = cat.args[0]
    assert isinstance(parts, list | tuple)
    return table if len(parts) == 2 and parts[0] is parts[1] else None


def linear_to_float(
    b: Builder,
    node: Node,
    x: Value,
    weight: Value,
    deq_scale: Value,
    quant_bias: Value | None,
    dtype: torch.dtype,
) -> Value:
    """`kvc8.quant_linear`, its bias multiplied when the model is loaded."""
    if dtype is not F32:
        return quant_linear(b, node, x, weight, deq_scale, quant_bias, dtype)
    codes, turned = operands(b, node, x, weight)
    bias = None
    if quant_bias is not None:
        bias = b.op("Mul", b.cast(quant_bias, torch.int32, F32), deq_scale)
    one = b.number(1, F32)
    given = (codes, turned, one, deq_scale, point(b), point(b), bias)
    [made] = b.call("com.microsoft", "MatMulIntegerToFloat", *given, outputs=1)
    return made
