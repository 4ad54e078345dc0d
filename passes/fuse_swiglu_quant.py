"""Compute SwiGLU and quantize it in one launch, by npu_dequant_swiglu_quant.

before:
    def lowered(
        x: f16[1, T, 64],
        s: f32[1] = reshape(cast(stored("is"), f32), [1]),
        z: i32[1] = cast(stored("io"), i32),
    ):
        npu_swiglu: f16[1, T, 32] = npu.npu_swiglu(x, -1)
        x8: i8[1, T, 32] = npu.npu_quantize(npu_swiglu, s, z, 1, -1, True)
        return [x8]

after:
    def lowered(
        x: f16[1, T, 64],
        s_wide: f32[1, 32] = expand(reshape(cast(stored("is"), f32), [1]), [1, 32]),
        z_wide: f32[1, 32] = expand(cast(cast(stored("io"), i32), f32), [1, 32]),
    ):
        reshape: f16[T, 64] = aten.reshape(x, [-1, 64])
        npu_dequant_swiglu_quant: (i8[T, 32], f32[T]) = npu.npu_dequant_swiglu_quant(reshape, quant_scale=s_wide, quant_offset=z_wide, activate_left=True, quant_mode=0)
        getitem: i8[T, 32] = npu_dequant_swiglu_quant[0]
        reshape_1: i8[1, T, 32] = aten.reshape(getitem, [1, -1, 32])
        return [reshape_1]

A swiglu that npu_dynamic_quant reads, as in a mixture's experts, is quantized by the op's mode of a
scale a token.

Bound. The op rounds once, to a code; npu_swiglu rounds to the dtype of x before. A code that does not
saturate stands for at most 255.5 steps, of which that rounding moves 255.5 * 2**-11 in float16 and
255.5 * 2**-8 in bfloat16, less than one: codes differ by at most 1, and in float32 by nothing. With
a scale a token both the value and the scale move, each by half a unit in the last place, 2**-11 or
2**-9 of itself: 127 steps by 0.13 or 0.5.
"""

from collections.abc import Callable, Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

RESHAPE = torch.ops.aten.reshape.default


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """By how much codes may differ: see the module."""
    source = argument(old, 0) if is_call(old, getitem) else old
    if not is_call(source, npu.npu_quantize, npu.npu_dynamic_quant):
        return torch.zeros(())
    if tensor_type(old).dtype is not torch.int8:
        return torch.zeros(())  # a token's scale
    old = source
    return torch.tensor(float(tensor_type(argument(old, 0)).dtype is not torch.float32))


@rewrite(takes=Stage.LOWERED, gives=Stage.LOWERED, contract="quantizing", bound=bound)
def fuse_swiglu_quant(program: Program) -> Iterator[Remark]:
    """See the module."""
    for swiglu in program.calls(npu.npu_swiglu):
        dynamic = _dynamic(swiglu)
        if dynamic is not None:
            yield hit(_by_token(program, swiglu, dynamic))
            continue
        quantize = _quantizer(swiglu)
        if quantize is None:
            yield miss(swiglu, "it is not read by a single quantizer of one scale")
            continue
        both = _fused(program, swiglu, quantize)
        codes = program.call(quantize, getitem, both, 0)
        shape = [1, -1, int(tensor_type(swiglu).shape[-1])]
        quantize.replace_all_uses_with(program.call(quantize, RESHAPE, codes, shape))
        yield hit(both)


def _dynamic(swiglu: Node) -> Node | None:
    """The npu_dynamic_quant that alone reads a swiglu, as it is or as a list of rows."""
    readers = list(swiglu.users)
    if len(readers) == 1 and is_call(readers[0], RESHAPE):
        readers = list(readers[0].users)
    found = len(readers) == 1 and is_call(readers[0], npu.npu_dynamic_quant)
    return readers[0] if found and not readers[0].kwargs and swiglu.args[1] == -1 else None


def _by_token(program: Program, swiglu: Node, dynamic: Node) -> Node:
    """The call in the place of both, which gives codes and scales as npu_dynamic_quant does."""
    width = int(tensor_type(swiglu).shape[-1])
    x = argument(swiglu, 0)
    if len(tensor_type(x).shape) > 2:
        x = program.call(swiglu, RESHAPE, x, [-1, 2 * width])
    options = {"activate_left": True, "quant_mode": 1}
    fused = program.call(swiglu, npu.npu_dequant_swiglu_quant, x, kwargs=options)
    for item in list(dynamic.users):
        item.replace_all_uses_with(program.call(dynamic, getitem, fused, item.args[1]))
    return fused


def _quantizer(swiglu: Node) -> Node | None:
    [reader] = swiglu.users if len(swiglu.users) == 1 else [None]
    if reader is None or not is_call(reader, npu.npu_quantize) or swiglu.args[1] != -1:
        return None
    if len(tensor_type(swiglu).shape) != 3 or tensor_type(swiglu).shape[0] != 1:
        return None
    one = tensor_type(argument(reader, 1)).shape == (1,)
    return reader if one and list(reader.args[3:]) == [1, -1, True] else None


def _fused(program: Program, swiglu: Node, quantize: Node) -> Node:
    """The call; the op takes two dimensions, and silu is of the left half where one says so."""
    width = int(tensor_type(swiglu).shape[-1])
    x = program.call(swiglu, RESHAPE, argument(swiglu, 0), [-1, 2 * width])
    zero = quantize.args[2]
    options = {
        "quant_scale": _wide(program, argument(quantize, 1), width),
        "quant_offset": _wide(program, zero, width) if isinstance(zero, Node) else None,
        "activate_left": True,
        "quant_mode": 0,
    }
    return program.call(swiglu, npu.npu_dequant_swiglu_quant, x, kwargs=options)


def _wide(program: Program, source: Node, width: int) -> Node:
    """A parameter of one value as float32 [1, width]."""
    expression, f32 = expression_of(source), torch.float32
    expression = expression if tensor_type(source).dtype is f32 else cast(expression, f32)
    wide = Expression("expand", (expression, (1, width)))
    return program.placeholder(f"{source.name}_wide", TensorType(f32, (1, width)), wide)
