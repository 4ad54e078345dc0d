"""Add, normalize and quantize in one launch: what comes before an RMSNorm and after it.

    sum, norm, quantize    npu_add_rms_norm_quant
    sum, norm              npu_add_rms_norm, where others than one quantizer read the norm
    norm, quantize         npu_rms_norm_quant, as in a first layer

before:
    def lowered(
        a: f16[1, T, 64],
        b: f16[1, T, 64],
        w: f16[64] = stored("w"),
        s: f32[1] = reshape(cast(stored("is"), f32), [1]),
        z: i32[1] = cast(stored("io"), i32),
    ):
        add: f16[1, T, 64] = aten.add.Tensor(a, b)
        norm: (f16[1, T, 64], f32[1, T, 1]) = npu.npu_rms_norm(add, w, 1e-05)
        getitem: f16[1, T, 64] = norm[0]
        x8: i8[1, T, 64] = npu.npu_quantize(getitem, s, z, 1, -1, True)
        first: (f16[1, T, 64], f32[1, T, 1]) = npu.npu_rms_norm(b, w, 1e-05)
        getitem_1: f16[1, T, 64] = first[0]
        y8: i8[1, T, 64] = npu.npu_quantize(getitem_1, s, z, 1, -1, True)
        last: f16[1, T, 64] = aten.add.Tensor(add, a)
        norm_1: (f16[1, T, 64], f32[1, T, 1]) = npu.npu_rms_norm(last, w, 1e-05)
        getitem_2: f16[1, T, 64] = norm_1[0]
        return [x8, y8, getitem_2]

after:
    def lowered(
        a: f16[1, T, 64],
        b: f16[1, T, 64],
        w: f16[64] = stored("w"),
        s_wide: f32[64] = expand(reshape(cast(stored("is"), f32), [1]), [64]),
        z_wide: i32[64] = expand(cast(stored("io"), i32), [64]),
        s_narrow: f16[1] = cast(reshape(cast(stored("is"), f32), [1]), f16),
        z_int8: i8[1] = cast(cast(stored("io"), i32), i8),
        w_zeros: f16[64] = expand(cast(values([0.0], f32), f16), [64]),
    ):
        npu_add_rms_norm_quant: (i8[1, T, 64], i8[1, T, 64], f16[1, T, 64]) = npu.npu_add_rms_norm_quant(a, b, w, s_wide, z_wide, epsilon=1e-05)
        getitem_3: i8[1, T, 64] = npu_add_rms_norm_quant[0]
        getitem_4: f16[1, T, 64] = npu_add_rms_norm_quant[2]
        npu_rms_norm_quant: i8[1, T, 64] = npu.npu_rms_norm_quant(b, w, w_zeros, s_narrow, z_int8, 1e-05)
        npu_add_rms_norm: (f16[1, T, 64], f32[1, T, 1], f16[1, T, 64]) = npu.npu_add_rms_norm(getitem_4, a, w, 1e-05)
        getitem_5: f16[1, T, 64] = npu_add_rms_norm[0]
        return [getitem_3, npu_rms_norm_quant, getitem_5]

Bound. npu_rms_norm rounds once, after the weight; npu_add_rms_norm_quant rounds before and after it.
With u half a unit in the last place, relative (2**-11 in float16, 2**-8 in bfloat16, and in float32
nothing, for its steps are the same), the two differ by at most 3u. A code that does not saturate
stands for at most 255.5 steps, so codes differ by at most the next whole number above 255.5 * 3u:
1 in float16, 3 in bfloat16, 0 in float32. npu_rms_norm_quant does not round before it divides, but
rounds to float16 what it then rounds to a code, at most 128 in size: 255.5*u + 128 * 2**-11, and as
much again as its scale loses in the dtype of x (at most 255.5*u, nothing if the checkpoint is of
that dtype): at most 1 in float16, 3 in bfloat16. In float32 it multiplies by 1/s where npu_quantize
divides: at most 1. npu_add_rms_norm is the same, bit for bit.
"""

from collections.abc import Callable, Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.expression import Expression, cast, values
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ADD = torch.ops.aten.add.Tensor


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """By how much codes may differ: see the module. Sums and norms may not differ at all."""
    alone = is_call(new, npu.npu_rms_norm_quant)
    fused = is_call(new, getitem) and is_call(argument(new, 0), npu.npu_add_rms_norm_quant)
    if not alone and (not fused or new.args[1] != 0):
        return torch.zeros(())
    x = tensor_type(argument(new if alone else argument(new, 0), 0)).dtype
    most = {torch.float16: 1.0, torch.bfloat16: 3.0, torch.float32: float(alone)}
    return torch.tensor(most[x])


@rewrite(takes=Stage.LOWERED, gives=Stage.LOWERED, contract="quantizing", bound=bound)
def fuse_norm_quant(program: Program) -> Iterator[Remark]:
    """See the module."""
    for norm in program.calls(npu.npu_rms_norm):
        total, quantize = _sum(norm), _quantizer(norm)
        if total is None and quantize is None:
            yield miss(norm, "it is of no sum, and not read by a single quantizer of one scale")
        elif total is None and len(tensor_type(argument(norm, 1)).shape) > 1:
            yield miss(norm, "it is over several dimensions, and npu_rms_norm_quant over the last")
        elif total is None:
            assert quantize is not None
            yield hit(_norm_quant(program, norm, quantize))
        elif quantize is None:
            why = "not read by a single quantizer of one scale, so quantized apart or not at all"
            yield hit(_add_norm(program, norm, total), why)
        else:
            yield hit(_add_norm_quant(program, norm, total, quantize))


def _sum(norm: Node) -> Node | None:
    """The sum that is normalized, of two values of its own type."""
    total = argument(norm, 0)
    if not is_call(total, ADD) or total.kwargs:
        return None
    parts = [part for part in total.args if isinstance(part, Node)]
    alike = len(parts) == 2 and all(tensor_type(p) == tensor_type(total) for p in parts)
    return total if alike else None


def _quantizer(norm: Node) -> Node | None:
    """The quantizer that alone reads the norm, if it has one scale, divides and rounds to int8."""
    items = list(norm.users)
    readers = [user for item in items for user in item.users]
    if [item.args[1] for item in items] != [0] or len(readers) != 1:
        return None
    [quantize] = readers
    if not is_call(quantize, npu.npu_quantize) or list(quantize.args[3:]) != [1, -1, True]:
        return None
    return quantize if tensor_type(argument(quantize, 1)).shape == (1,) else None


def _add_norm_quant(program: Program, norm: Node, total: Node, quantize: Node) -> Node:
    width = tensor_type(argument(norm, 1)).shape
    scale = _derived(program, argument(quantize, 1), "_wide", torch.float32, width)
    zero = quantize.args[2]
    if isinstance(zero, Node):
        zero = _derived(program, zero, "_wide", torch.int32, width)
    args = (*total.args, argument(norm, 1), scale, zero)
    options = {"epsilon": norm.args[2]}
    fused = program.call(total, npu.npu_add_rms_norm_quant, *args, kwargs=options)
    return _replace(program, norm, total, fused, quantize)


def _add_norm(program: Program, norm: Node, total: Node) -> Node:
    args = (*total.args, *norm.args[1:])
    fused = program.call(total, npu.npu_add_rms_norm, *args)
    normed = next(item for item in norm.users if item.args[1] == 0)
    return _replace(program, norm, total, fused, normed)


def _replace(program: Program, norm: Node, total: Node, fused: Node, result: Node) -> Node:
    """Take the result and the sum out of a fused call, in which both come first and third."""
    fused.meta["origin"] = norm.meta.get("origin", "")
    result.replace_all_uses_with(program.call(total, getitem, fused, 0))
    total.replace_all_uses_with(program.call(total, getitem, fused, 2))
    return fused


def _norm_quant(program: Program, norm: Node, quantize: Node) -> Node:
    x, gamma, epsilon = norm.args
    type_ = tensor_type(gamma)
    scale = _derived(program, argument(quantize, 1), "_narrow", type_.dtype, (1,))
    zero = quantize.args[2]
    if isinstance(zero, Node):
        zero = _derived(program, zero, "_int8", torch.int8, (1,))
    else:
        zero = _zeros(program, argument(quantize, 1), TensorType(torch.int8, (1,)))
    beta = _zeros(program, argument(norm, 1), type_)
    fused = program.call(norm, npu.npu_rms_norm_quant, x, gamma, beta, scale, zero, epsilon)
    quantize.replace_all_uses_with(fused)
    return fused


def _derived(
    program: Program, source: Node, suffix: str, dtype: torch.dtype, shape: tuple[object, ...]
) -> Node:
    """A parameter of one value as the op wants it: in a dtype, as often as the shape says."""
    expression = expression_of(source)
    expression = expression if tensor_type(source).dtype is dtype else cast(expression, dtype)
    sizes = tuple(int(size) for size in shape)  # type: ignore[call-overload]
    expression = expression if sizes == (1,) else Expression("expand", (expression, sizes))
    return program.placeholder(f"{source.name}{suffix}", TensorType(dtype, sizes), expression)


def _zeros(program: Program, source: Node, type_: TensorType) -> Node:
    zero = values(torch.zeros(1, dtype=torch.float32))
    sizes = tuple(int(size) for size in type_.shape)
    expression = Expression("expand", (cast(zero, type_.dtype), sizes))
    return program.placeholder(f"{source.name}_zeros", type_, expression)
