"""Products of int8 codes in ONNX, exact on every CPU.

    MatMulInteger(a + 128, w + 128, 128, 128)   unsigned: what a model's file has
    MatMulInteger(a + 128, w, 128)              mixed: what a session computes where it may

Both are exact by ONNX's definition. On x86 with AVX2 or AVX-512 and without VNNI, ONNX Runtime adds
up pairs of products of uint8 by int8 in int16, which saturates. With VNNI or AMX the mixed form is
exact, and it alone has their instructions. Products of two unsigned operands are exact on every
CPU; so are those of two signed ones, and take tens of times as long on most x86.
"""

import onnx_ir as ir
import torch

from kvc8.backends.onnx.builder import Builder, Value


def point(b: Builder) -> Value:
    """The zero point of codes that are kept 128 higher, in uint8."""
    return b.constant(torch.tensor(128, dtype=torch.uint8))


def unsigned(b: Builder, codes: Value) -> Value:
    """Codes in int8 as uint8, 128 higher: the same bits but for the first."""
    return b.op("BitwiseXor", b.op("Cast", codes, to=ir.DataType.UINT8.value), point(b))
