"""Compute W8A8_DYNAMIC linears by npu_dynamic_quant and npu_quant_matmul with a scale a token.

The tokens' scales are float32 in one dimension, so the rows of a batch come as one list. A float16
result takes its weight's scale in float32 here, and not in 19 bits.

before:
    def lowering(
        x: f16[1, T, 64],
        w: i8[32, 64] = stored("w"),
        ws: f32[32] = reshape(cast(stored("ws"), f32), [32]),
    ):
        quantize_tokens: (i8[1, T, 64], f32[1, T]) = kvc8.quantize_tokens(x)
        getitem: i8[1, T, 64] = quantize_tokens[0]
        getitem_1: f32[1, T] = quantize_tokens[1]
        linear: f16[1, T, 32] = kvc8.dynamic_linear(getitem, getitem_1, w, ws, None, f16)
        return [linear]

after:
    def lowering(
        x: f16[1, T, 64],
        ws: f32[32] = reshape(cast(stored("ws"), f32), [32]),
        w_t: i8[64, 32] = transpose(stored("w"), 0, 1),
    ):
        reshape: f16[T, 64] = aten.reshape(x, [-1, 64])
        npu_dynamic_quant: (i8[T, 64], f32[T]) = npu.npu_dynamic_quant(reshape)
        getitem_2: i8[T, 64] = npu_dynamic_quant[0]
        getitem_3: f32[T] = npu_dynamic_quant[1]
        linear_1: f16[T, 32] = npu.npu_quant_matmul(getitem_2, w_t, ws, pertoken_scale=getitem_3, bias=None, output_dtype=5)
        reshape_1: f16[1, T, 32] = aten.reshape(linear_1, [1, -1, 32])
        return [reshape_1]

The result is the same, bit for bit: both are (x8·w)*ws*s + b, in that order.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir import npu, ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, Stage, argument, expression_of, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.token_codes import dynamic_codes
from kvc8.passes.rewrite import Remark, hit, rewrite

RESHAPE = torch.ops.aten.reshape.default


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def lower_dynamic_linear(program: Program) -> Iterator[Remark]:
    """See the module."""
    codes: dict[Node, tuple[Node, Node]] = {}
    for linear in program.calls(ops.dynamic_linear):
        quantize = argument(argument(linear, 0), 0)
        if quantize not in codes:
            codes[quantize] = dynamic_codes(program, quantize)
        new = _matmul(program, linear, *codes[quantize])
        shape = [size if isinstance(size, int) else -1 for size in tensor_type(linear).shape]
        back = program.call(linear, RESHAPE, new, shape) if len(shape) > 2 else new
        linear.replace_all_uses_with(back)
        yield hit(new)


def _matmul(program: Program, linear: Node, codes: Node, scale: Node) -> Node:
    _, _, weight, weight_scale, bias, dtype = linear.args
    assert isinstance(weight, Node)
    out, width = tensor_type(weight).shape
    turned = Expression("transpose", (expression_of(weight), 0, 1))
    name = f"{weight.name.removesuffix('_int8')}_t"
    matrix = program.placeholder(name, TensorType(torch.int8, (width, out)), turned)
    options = {
        "pertoken_scale": scale,
        "bias": bias,
        "output_dtype": npu.SCALAR_TYPES[dtype],  # type: ignore[index]
    }
    args = (codes, matrix, weight_scale)
    return program.call(linear, npu.npu_quant_matmul, *args, name="linear", kwargs=options)
