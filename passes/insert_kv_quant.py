"""Keep the KV cache in int8: quantize rows on their way in, dequantize the cache on its way out.

before:
    def captured(
        k: f16[T, 2, 8],
        slots: i32[T],
        k_cache_0: f16[N, S, 2, 8] = cache(stored("ks"), None, "post-rope"),
    ):
        k_new_0: f16[N, S, 2, 8] = kvc8.cache_write(k_cache_0, k, slots)
        neg: f16[N, S, 2, 8] = aten.neg(k_new_0)
        return [neg, k_new_0]

after:
    def quantized(
        k: f16[T, 2, 8],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 8] = cache(),
        k_scale_0: f32[2, 8] = stored("ks"),
    ):
        quantize: i8[T, 2, 8] = kvc8.quantize(k, k_scale_0, None)
        k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, quantize, slots)
        dequantize: f16[N, S, 2, 8] = kvc8.dequantize(k_new_0, k_scale_0, None, f16)
        neg: f16[N, S, 2, 8] = aten.neg(dequantize)
        return [neg, k_new_0]

A cache for which the checkpoint has no scale is left alone and stays float. One of latents
(passes/fold_latent_attention.py) is too, and a model all of whose caches are such is in order.

Bound: a value within [s*(-128 - z), s*(127 - z)] comes back within s/2 of itself, and then rounded
once to the dtype of the cache; one outside comes back as the nearer end.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    expression_of,
    is_cache,
    is_call,
    tensor_type,
    users,
)
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.latent import holds_latent
from kvc8.passes.rewrite import Remark, hit, keep, miss, rewrite


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far what a cache gives back may be from what went in: see the module.

    Nothing, where the scale or the zero point is another than the cache had in its expression.
    """
    if not is_call(new, ops.dequantize) or not is_call(old, ops.cache_write):
        return torch.zeros(())
    scale, zero, *_ = expression_of(argument(old, 0)).args
    used = [expression_of(arg) if isinstance(arg, Node) else None for arg in new.args[1:3]]
    if used != [scale, zero]:
        return torch.zeros(())
    x, step = look(old), look(argument(new, 1))
    offset = look(argument(new, 2)) if zero is not None else torch.zeros_like(step)
    return step / 2 + (x - x.clamp(step * (-128 - offset), step * (127 - offset))).abs()


@rewrite(
    takes=Stage.CAPTURED,
    gives=Stage.QUANTIZED,
    contract="quantizing",
    bound=bound,
    required="quantize the KV cache of this model first, with kvc8-quantize",
)
def insert_kv_quant(program: Program) -> Iterator[Remark]:
    """See the module."""
    for write in program.calls(ops.cache_write):
        cache = argument(write, 0)
        if holds_latent(write):
            yield keep(write, "it holds latents, which are small and stay float")
            continue
        if not is_cache(cache) or not expression_of(cache).args:
            yield miss(write, "the checkpoint has no scale for this cache")
            continue
        scale, zero = _scale(program, cache)
        rows = program.call(write, ops.quantize, argument(write, 1), scale, zero)
        wide, readers = tensor_type(cache).dtype, list(users(write))
        cache.meta["type"] = TensorType(torch.int8, tensor_type(cache).shape)
        cache.meta["expression"] = Expression("cache")
        write.update_arg(1, rows)
        write.meta["type"] = program.infer(write)
        back = program.call(write.next, ops.dequantize, write, scale, zero, wide)
        back.meta["origin"] = write.meta.get("origin", "")
        for reader in readers:
            reader.replace_input_with(write, back)
        yield hit(write, "symmetric" if zero is None else "with zero points")


def _scale(program: Program, cache: Node) -> tuple[Node, Node | None]:
    scale, zero, *_ = expression_of(cache).args
    type_ = TensorType(torch.float32, tensor_type(cache).shape[2:])
    assert isinstance(scale, Expression)
    node = program.placeholder(cache.name.replace("cache", "scale"), type_, scale)
    if not isinstance(zero, Expression):
        return node, None
    return node, program.placeholder(cache.name.replace("cache", "zero"), type_, zero)
