"""Derive the eight quantize/dequantize parameters of each layer, in the form the NPU's ops take.

npu_quantize divides and adds, in float32: the scale as it is, the zero point as int32. What reads
the cache adds its offset where the checkpoint's convention subtracts: x' = (q + o)*s with o = -z.
A symmetric cache has no offsets. Shapes are [H*D], the channels of a token. What lowers the cache's
reads and fuses its writes goes on from here: docs/phases.md has the form that each op wants.

before:
    def quantized(
        k: f16[T, 2, 8],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 8] = cache(),
        k_scale_0: f32[2, 8] = stored("ks"),
        k_zero_0: f32[2, 8] = stored("kz"),
    ):
        quantize: i8[T, 2, 8] = kvc8.quantize(k, k_scale_0, k_zero_0)
        k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, quantize, slots)
        dequantize: f16[N, S, 2, 8] = kvc8.dequantize(k_new_0, k_scale_0, k_zero_0, f16)
        return [dequantize, k_new_0]

after:
    def lowering(
        k: f16[T, 2, 8],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 8] = cache(),
        k_quant_scale_0: f32[16] = reshape(stored("ks"), [16]),
        k_quant_offset_0: i32[16] = cast(reshape(stored("kz"), [16]), i32),
        k_dequant_scale_0: f32[16] = reshape(stored("ks"), [16]),
        k_dequant_offset_0: f32[16] = cast(neg(cast(reshape(stored("kz"), [16]), i32)), f32),
    ):
        reshape: f16[T, 16] = aten.reshape(k, [-1, 16])
        npu_quantize: i8[T, 16] = npu.npu_quantize(reshape, k_quant_scale_0, k_quant_offset_0, 1, -1, True)
        reshape_1: i8[T, 2, 8] = aten.reshape(npu_quantize, [-1, 2, 8])
        k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, reshape_1, slots)
        flatten: i8[N, S, 16] = aten.flatten.using_ints(k_new_0, 2, 3)
        npu_anti_quant: f16[N, S, 16] = npu.npu_anti_quant(flatten, k_dequant_scale_0, offset=k_dequant_offset_0, dst_dtype=5)
        unflatten: f16[N, S, 2, 8] = aten.unflatten.int(npu_anti_quant, 2, [2, 8])
        return [unflatten, k_new_0]

A quantize whose zero points are no whole numbers would change here; verify refuses none, for
every producer writes whole numbers. What is not the quantize of a cache's rows is left alone.
"""

import math
from collections.abc import Iterator

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu, ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.token_cache import is_steps, quantized_tokens
from kvc8.ir.types import TensorType
from kvc8.passes.rewrite import Remark, hit, keep, miss, rewrite

ATEN = torch.ops.aten


@rewrite(takes=Stage.QUANTIZED, gives=Stage.LOWERING, contract="bit_exact")
def fold_kv_scales(program: Program) -> Iterator[Remark]:
    """See the module."""
    for write in program.calls(ops.cache_write):
        rows = argument(write, 1)
        if is_steps(argument(write, 0)) or quantized_tokens(rows) is not None:
            yield keep(write, "its tokens have scales of their own")
            continue
        if not is_call(rows, ops.quantize):
            yield miss(write, "its cache is float")
            continue
        parts = _eight(program, argument(write, 0).name, argument(rows, 1), rows.args[2])
        _fold_quantize(program, rows, *parts[:2])
        for back in [user for user in write.users if is_call(user, ops.dequantize)]:
            _fold_dequantize(program, back, *parts[2:])
        symmetric = rows.args[2] is None
        yield hit(write, "symmetric, so without offsets" if symmetric else "offsets negated")


def _eight(
    program: Program, cache: str, scale: Node, zero: Argument
) -> tuple[Node, Node | None, Node, Node | None]:
    """Scale and offset to quantize, and to dequantize: the four of the eight that are K's or V's."""
    flat = (math.prod(map(int, tensor_type(scale).shape)),)

    def parameter(part: str, expression: Expression, dtype: torch.dtype) -> Node:
        return program.placeholder(
            cache.replace("cache", part), TensorType(dtype, flat), expression
        )

    scales = Expression("reshape", (expression_of(scale), flat))
    if not isinstance(zero, Node):
        quant_scale = parameter("quant_scale", scales, torch.float32)
        return quant_scale, None, parameter("dequant_scale", scales, torch.float32), None
    zeros = cast(Expression("reshape", (expression_of(zero), flat)), torch.int32)
    # Negated in int32: float -0.0 is not the zero that runtimes compare with bit by bit.
    offsets = cast(Expression("neg", (zeros,)), torch.float32)
    return (
        parameter("quant_scale", scales, torch.float32),
        parameter("quant_offset", zeros, torch.int32),
        parameter("dequant_scale", scales, torch.float32),
        parameter("dequant_offset", offsets, torch.float32),
    )


def _fold_quantize(program: Program, rows: Node, scale: Node, offset: Node | None) -> None:
    heads, dim = (int(d) for d in tensor_type(rows).shape[1:])
    x = program.call(rows, ATEN.reshape.default, argument(rows, 0), [-1, heads * dim])
    args = (x, scale, offset, npu.SCALAR_TYPES[torch.int8], -1, True)
    codes = program.call(rows, npu.npu_quantize, *args)
    back = program.call(rows, ATEN.reshape.default, codes, [-1, heads, dim])
    rows.replace_all_uses_with(back)


def _fold_dequantize(program: Program, back: Node, scale: Node, offset: Node | None) -> None:
    heads, dim = (int(d) for d in tensor_type(back).shape[2:])
    code = npu.SCALAR_TYPES[tensor_type(back).dtype]
    codes = program.call(back, ATEN.flatten.using_ints, argument(back, 0), 2, 3, name="flatten")
    options = {"offset": offset, "dst_dtype": code}
    wide = program.call(back, npu.npu_anti_quant, codes, scale, kwargs=options)
    shaped = program.call(back, ATEN.unflatten.int, wide, 2, [heads, dim])
    back.replace_all_uses_with(shaped)
