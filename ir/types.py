"""The type of every value in a program: dtype and shape, where a dimension may be symbolic.

A dimension is an int or an expression of named sizes, such as `T` or `B + 1`. The sizes that the
inputs of a program use (see ir/capture/trace.py):

    T  tokens of the batch, flattened        N  blocks of the KV cache
    B  sequences                             S  tokens a block holds
    M  blocks a sequence's table has room for   R  rows whose logits are wanted
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import sympy
import torch

from kvc8.ir.errors import IRError

Dim: TypeAlias = int | sympy.Expr

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "b8": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorType:
    """A tensor, `f16[T, 64]` in text."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        shape = ", ".join(map(show_dim, self.shape)) or "()"  # Python has no x[]
        return f"{dtype_name(self.dtype)}[{shape}]"


@dataclass(frozen=True)
class IntType:
    """A whole number on the host, `int[T]` in text; its value is known as an expression."""

    value: Dim

    def __str__(self) -> str:
        return f"int[{show_dim(self.value)}]"


@dataclass(frozen=True)
class IntsType:
    """A list of whole numbers on the host, `ints[B]` in text; its length is known."""

    length: Dim

    def __str__(self) -> str:
        return f"ints[{show_dim(self.length)}]"


Type: TypeAlias = "TensorType | IntType | IntsType | tuple[Type, ...]"


def size(name: str) -> sympy.Symbol:
    """A named size; the same name is the same symbol."""
    return sympy.Symbol(name, integer=True, positive=True)


def dim(expr: object) -> Dim:
    """A sympy expression or an int as a dimension: an int wherever it is constant."""
    simple = sympy.sympify(expr)
    return int(simple) if simple.is_Integer else simple


@cache  # printing an expression takes long, and a model has few of them
def show_dim(d: Dim) -> str:
    """A dimension as text that Python reads back."""
    return str(d)


def show_type(t: Type) -> str:
    """A type as text."""
    return f"({', '.join(map(show_type, t))})" if isinstance(t, tuple) else str(t)


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype. Raises IRError for one that programs do not use."""
    if dtype not in DTYPE_NAMES:
        raise IRError(
            str(dtype), "has no place in a program", f"cast to one of {', '.join(DTYPES)}"
        )
    return DTYPE_NAMES[dtype]
