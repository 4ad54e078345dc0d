"""How a parameter is made from the tensors of a checkpoint, at load time.

An expression is an expression; in a program's text it stands as the parameter's default:

    w: f16[64, 96] = transpose(stored("model.layers.0.mlp.down_proj.weight"), 0, 1)

| expression | gives |
|---|---|
| `stored(name)` | the checkpoint's tensor |
| `stacked(name, n)` | [n, ...]: the tensors whose names have 0 to n - 1 in the place of `*` |
| `values([...], dtype)` | the numbers written here, 1-D (rotary frequencies, say) |
| `cast(x, dtype)` `reshape(x, shape)` `transpose(x, a, b)` | as torch |
| `slice(x, dim, start, end)` `concat([x, ...], dim)` | as torch |
| `shard(x, dim, size)` | of x along dim, each rank's own `size` entries (ir/ranks.py) |
| `shard(x, dim, size, copies)` | the same, where so many neighboring ranks share a part |
| `first(x)` | x on the first rank, zeros on the others |
| `neg(x)` `reciprocal(x)` `round(x)` `expand(x, shape)` | as torch |
| `add(x, y)` `sub(x, y)` `mul(x, y)` `div(x, y)` | as torch, broadcast |
| `per_query(x, groups)` | of [H, D], what each query head sees: [H*groups*D] |
| `matvec(w, x)` | [O] of w [O, K] and x [K], float64 |
| `head_power(x)` | of [H, D], the least power of two above each row that float16 holds: [H, D] |
| `float_bits(x)` | float32 whose bits are the low half of int64 x (msModelSlim's deq_scale) |
| `int_bits(x)` | the inverse: float32's bits, zero-extended to int64 |
| `w8a8(w8, input_scale, input_offset, deq_scale, quant_bias)` | the float weight: w8*deq/input |
| `w8a8_bias(...)` | the float bias that quant_bias stands for |
| `w8a8_dynamic(w8, weight_scale)` | the float weight: w8*scale, a scale a row |
| `w8a8_mix(w8, weight_scale, input_scale, input_offset, deq_scale, quant_bias)` | the same |
| `mixed(w8, input_scale, input_offset, deq_scale, quant_bias)` | w8, and what is static of it |
| `rope_bound(scale, zero, distance, width, kind, factor)` | K scales that hold after RoPE |
| `round_up(x, dtype)` | float32 x, at least as large and exact in dtype |
| `fp19(x)` | float32 x cut to the 10 fraction bits that an int8 matmul reads of a packed scale |
| `masked_above(n)` | bool [n, n], True above the diagonal: the NPU's compressed causal mask |
| `derived(name)` | what the compiler made of an expression like these; an artifact holds it |
| `smoothing(scale, zero)` | of [H, D], what brings channels to one size: [H*D], from 1 to 2048 |
| `cache(scale, zero, calibrated)` | a KV cache: what the runtime allocates, not a tensor on disk |
| `cache_nz(heads)` | the same of int8 in NZ format (ir/nz.py) |
| `cache_steps()` | float32 [N, S, 1, 1]: the scale of each token of another cache |
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from kvc8.ir.errors import IRError
from kvc8.ir.types import DTYPE_NAMES

Arg: TypeAlias = "Expression | str | int | float | torch.dtype | tuple[Arg, ...] | None"
Read = Callable[[str], Tensor]
SMOOTHING = 0.8  # see passes/insert_token_quant.py
LARGEST_SMOOTHING = 2048.0  # which float16 and bfloat16 hold, and so its inverse
EACH_RANK = ("shard", "first")  # what ir/ranks.py binds to a rank


@dataclass(frozen=True)
class Expression:
    """One step of an expression: an operation of the module's table and its arguments."""

    op: str
    args: tuple[Arg, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(_show, self.args))})"

    @cached_property
    def differs(self) -> bool:
        """Whether ranks make different things of it."""
        return self.op in EACH_RANK or any(map(_differs, self.args))


def _differs(arg: Arg) -> bool:
    if isinstance(arg, tuple):
        return any(map(_differs, arg))
    return isinstance(arg, Expression) and arg.differs


def stored(name: str) -> Expression:
    """The checkpoint's tensor of that name."""
    return Expression("stored", (name,))


def stacked(name: str, count: int) -> Expression:
    """The tensors whose names have 0, 1, ... in the place of the `*` of `name`, as one."""
    return Expression("stacked", (name, count))


def cast(x: Expression, dtype: torch.dtype) -> Expression:
    """The values of x in another dtype."""
    return Expression("cast", (x, dtype))


def values(tensor: Tensor) -> Expression:
    """A small float tensor of one dimension, written out."""
    return Expression("values", (tuple(tensor.tolist()), tensor.dtype))


def stored_names(expression: Expression) -> Iterator[str]:
    """The checkpoint's tensors that an expression reads."""
    if expression.op == "stored":
        yield str(expression.args[0])
    if expression.op == "stacked":
        yield from stacked_names(expression)
    for arg in expression.args:
        for item in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(item, Expression):
                yield from stored_names(item)


def stacked_names(of: Expression) -> Iterator[str]:
    """The names that a `stacked(name, n)` speaks of, in order."""
    name, count = of.args
    head, _, tail = str(name).partition("*")
    assert isinstance(count, int)
    yield from (f"{head}{i}{tail}" for i in range(count))


def make(expression: Expression, read: Read, derived: Read | None = None) -> Tensor:
    """Make the tensor; `read` gives the checkpoint's tensors by name, `derived` an artifact's."""
    if expression.op == "stored":
        return read(str(expression.args[0]))
    if expression.op == "stacked":
        return torch.stack([read(name) for name in stored_names(expression)])
    if expression.op == "slice" and (parts := _parts_of_each(expression)):
        return torch.stack([make(part, read) for part in parts])
    if expression.op == "derived" and derived:
        return derived(str(expression.args[0]))
    if expression.op in EACH_RANK:
        raise IRError(f"{expression.op}", "is another on each rank", "bind one, with of_rank")
    if expression.op not in STEPS:
        raise IRError(expression.op, "makes no tensor", f"use one of {', '.join(STEPS)}")
    return STEPS[expression.op](*(_made(arg, read, derived) for arg in expression.args))


def _parts_of_each(expression: Expression) -> list[Expression]:
    """The slices that a slice of `stacked` is made of, so that no rank reads all of a mixture."""
    x, dim, *ends = expression.args
    if not isinstance(x, Expression) or x.op != "stacked" or not isinstance(dim, int) or dim < 1:
        return []
    return [Expression("slice", (stored(name), dim - 1, *ends)) for name in stacked_names(x)]


def _made(arg: Arg, read: Read, derived: Read | None) -> object:
    if isinstance(arg, Expression):
        return make(arg, read, derived)
    return tuple(_made(item, read, derived) for item in arg) if isinstance(arg, tuple) else arg


def _slice(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    return x.narrow(dim, start, end - start)


def _float_bits(x: Tensor) -> Tensor:
    return x.to(torch.int32).view(torch.float32)


def _int_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _w8a8(w8: Tensor, in_scale: Tensor, _: Tensor, deq_scale: Tensor, __: Tensor) -> Tensor:
    return w8.float() * (deq_scale / in_scale.float())[:, None]


def _w8a8_bias(w8: Tensor, _: Tensor, offset: Tensor, deq_scale: Tensor, bias: Tensor) -> Tensor:
    return (bias.double() + w8.sum(1, dtype=torch.int64) * offset.double()) * deq_scale.double()


def _w8a8_dynamic(w8: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
    wide = scale.to(torch.promote_types(scale.dtype, torch.float32))
    return w8.float() * wide.reshape(*w8.shape[:-1], 1)


def furthest(zero: Tensor) -> Tensor:
    """How far from its zero point the further end of a quantizer's range lies, in steps."""
    return torch.maximum((-128 - zero).abs(), (127 - zero).abs())


def _smoothing(scale: Tensor, zero: Tensor | None) -> Tensor:
    """See passes/insert_token_quant.py; scale and zero [H, D]."""
    reach = scale.float() if zero is None else scale.float() * furthest(zero) / 127
    _, exponent = torch.frexp(reach.amax())
    ratio = torch.ldexp(torch.ones(()), exponent) / reach.double()
    # in float64: processors differ in the last bit of a power, and float32 then has none of it
    return (ratio**SMOOTHING).clamp(max=LARGEST_SMOOTHING).float().flatten()


def _rope_bound(
    scale: Tensor, zero: Tensor | None, distance: int, width: int, kind: str, factor: float = 1.0
) -> Tensor:
    """See passes/repair_rope_scales.py; scale [H, D], of which `width` channels are rotated."""
    far = 127.0 if zero is None else furthest(zero)
    reach = scale * far / 127
    turned = reach[:, :width].double()
    pairs = turned.unflatten(1, (2, distance) if kind == "half" else (-1, 2))
    bound = pairs.square().sum(1 if kind == "half" else 2, keepdim=True).sqrt()
    both = (bound * factor).expand_as(pairs).flatten(1).float()
    return torch.cat([both, reach[:, width:]], 1)


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    near = x.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, float("inf")))
    return torch.where(near.float() < x, above, near).float()


def _per_query(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, 0).flatten()


def _matvec(w: Tensor, x: Tensor) -> Tensor:
    parts = [rows.double() @ x.double() for rows in w.split(4096)]  # not all of w in float64
    return torch.cat(parts)


def _head_power(x: Tensor) -> Tensor:
    _, exponent = torch.frexp(x.abs().amax(1, keepdim=True))
    return torch.ldexp(torch.ones_like(x), exponent.clamp(-14, 15).expand(x.shape))


def _fp19(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def _masked_above(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


STEPS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "values": lambda numbers, dtype: torch.tensor(numbers, dtype=dtype),
        "cast": lambda x, dtype: x.to(dtype),
        "reshape": lambda x, shape: x.reshape(shape),
        "transpose": lambda x, a, b: x.transpose(a, b),
        "expand": lambda x, shape: x.expand(shape).contiguous(),  # as ops take it, at no launch
        "slice": _slice,
        "concat": lambda xs, dim: torch.cat(xs, dim),
        "neg": lambda x: -x,
        "reciprocal": lambda x: 1 / x,
        "round": lambda x: x.round(),
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "div": lambda x, y: x / y,
        "per_query": _per_query,
        "matvec": _matvec,
        "head_power": _head_power,
        "float_bits": _float_bits,
        "int_bits": _int_bits,
        "rope_bound": _rope_bound,
        "smoothing": _smoothing,
        "round_up": _round_up,
        "fp19": _fp19,
        "masked_above": _masked_above,
        "w8a8": _w8a8,
        "w8a8_bias": _w8a8_bias,
        "w8a8_dynamic": _w8a8_dynamic,
        "w8a8_mix": _w8a8_dynamic,
        "mixed": lambda w8, *_: w8,
    }
)


def _show(arg: Arg) -> str:
    if isinstance(arg, tuple):
        return f"[{', '.join(map(_show, arg))}]"
    if isinstance(arg, torch.dtype):
        return DTYPE_NAMES[arg]
    return f'"{arg}"' if isinstance(arg, str) else str(arg)
