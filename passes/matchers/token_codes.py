"""What the values of tokens are quantized to, each token by a scale of its own."""

from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.program import Program, argument, tensor_type

RESHAPE = torch.ops.aten.reshape.default


def dynamic_codes(program: Program, quantize: Node) -> tuple[Node, Node]:
    """The codes [T, K] and scales [T] of a `kvc8.quantize_tokens`, by npu_dynamic_quant."""
    x = argument(quantize, 0)
    width = int(tensor_type(x).shape[-1])
    rows = program.call(quantize, RESHAPE, x, [-1, width]) if len(tensor_type(x).shape) > 2 else x
    smooth = quantize.args[1] if len(quantize.args) > 1 else None
    options = {} if smooth is None else {"smooth_scales": smooth}
    both = program.call(quantize, npu.npu_dynamic_quant, rows, kwargs=options)
    return program.call(quantize, getitem, both, 0), program.call(quantize, getitem, both, 1)
