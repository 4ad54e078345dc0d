"""Parameters in an ONNX model: where the checkpoint keeps them, wherever that can be.

A stored tensor is external data at its place in its shard, which is hard-linked into the model's
directory, since ONNX Runtime reads no data from outside of it. Of other expressions,

    from under 64 KB of stored tensors   the tensor is made now and written to derived.bin
    cast, reshape, transpose, slice,     nodes over external data, which ONNX Runtime computes once
    concat, stacked, mixed, neg,         when it loads the model
    reciprocal, expand
    w8a8                                 likewise Cast and Mul, with a scale in derived.bin
    whatever else                        made now and written to derived.bin
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from kvc8.backends.onnx.builder import DTYPES, Builder, Value
from kvc8.ir.checkpoint.new_directory import PartialDirectory
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.expression import Arg, Expression, make, stored_names
from kvc8.ir.program import expression_of

SMALL = 1 << 16  # bytes; under it a tensor costs less than the nodes that would make it
ALIGNMENT = 64
DERIVED, FOLDER = "derived.bin", "weights"


@dataclass(frozen=True)
class Made:
    """A tensor that was made: where its bytes lie, its dtype and its shape."""

    where: tuple[str, int, int]  # file, offset, length
    dtype: torch.dtype
    shape: tuple[int, ...]


class Derived:
    """The bytes of derived.bin. Models that share one make each tensor once."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self._made: dict[str, Made] = {}

    def put(self, key: str, make: Callable[[], Tensor]) -> Made:
        """What was made under a key before, an expression's text for instance, or is made now."""
        if key not in self._made:
            tensor = make()
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            self.bytes += bytes(-len(self.bytes) % ALIGNMENT)
            where = DERIVED, len(self.bytes), len(raw)
            self.bytes += raw
            self._made[key] = Made(where, tensor.dtype, tuple(tensor.shape))
        return self._made[key]


class Weights:
    """Makes the parameters of one model, and remembers what must be written beside it."""

    def __init__(self, b: Builder, checkpoint: Checkpoint, derived: Derived) -> None:
        self.b, self.checkpoint, self.derived = b, checkpoint, derived
        self.shards: dict[str, Path] = {}
        self._stored: dict[str, Value] = {}

    def parameter(self, node: Node) -> Value:
        """The value of a parameter of the program."""
        return self._value(expression_of(node), node.name)

    def write(self, part: PartialDirectory) -> None:
        """Write what the model refers to, and another model has not written before."""
        (part.path / FOLDER).mkdir(exist_ok=True)
        for name, file in self.shards.items():
            if not (part.path / FOLDER / name).exists():
                part.link(f"{FOLDER}/{name}", file)
        if not (part.path / DERIVED).exists():
            part.write(DERIVED, bytes(self.derived.bytes))

    def _value(self, expression: Expression, name: str) -> Value:
        if expression.op == "stored":
            return self._external(str(expression.args[0]))
        size = sum(self.checkpoint.tensors[s].nbytes for s in stored_names(expression))
        if size < SMALL or expression.op not in (*NODES, "w8a8", "stacked"):
            return self._put(str(expression), lambda: make(expression, self.checkpoint.read), name)
        if expression.op == "w8a8":
            return self._w8a8(expression, name)
        if expression.op == "stacked":
            each = [self._external(stored) for stored in stored_names(expression)]
            rows = [self.b.op("Unsqueeze", part, [0]) for part in each]
            return self.b.op("Concat", *rows, axis=0)
        first, *rest = expression.args
        parts = first if isinstance(first, tuple) else (first,)
        made = [
            self._value(x, f"{name}/{i}") for i, x in enumerate(parts) if isinstance(x, Expression)
        ]
        return NODES[expression.op](self.b, self._rank(expression), made, *rest)

    def _rank(self, expression: Expression) -> int:
        """How many dimensions an expression gives, without data."""

        def empty(name: str) -> Tensor:
            stored = self.checkpoint.tensors[name]
            return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

        return make(expression, empty).dim()

    def _w8a8(self, expression: Expression, name: str) -> Value:
        """The float weight, each output's codes times its scale."""
        w8, in_scale, _, deq_scale, _ = (
            arg for arg in expression.args if isinstance(arg, Expression)
        )
        codes = self.b.cast(self._value(w8, name), torch.int8, torch.float32)
        scale = self._put(
            f"scale of {expression}",
            lambda: self._output_scale(in_scale, deq_scale),
            f"{name}/scale",
        )
        return self.b.op("Mul", codes, scale)

    def _output_scale(self, in_scale: Expression, deq_scale: Expression) -> Tensor:
        read = self.checkpoint.read
        return (make(deq_scale, read) / make(in_scale, read).float())[:, None]

    def _external(self, name: str) -> Value:
        if name not in self._stored:
            stored = self.checkpoint.tensors[name]
            self.shards[stored.file.name] = stored.file
            where = f"{FOLDER}/{stored.file.name}", stored.offset, stored.nbytes
            self._stored[name] = self._initializer(name, where, stored.dtype, stored.shape)
        return self._stored[name]

    def _put(self, key: str, make: Callable[[], Tensor], name: str) -> Value:
        made = self.derived.put(key, make)
        return self._initializer(f"{name}/derived", made.where, made.dtype, made.shape)

    def _initializer(
        self, name: str, where: tuple[str, int, int], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Value:
        data = ir.ExternalTensor(*where, DTYPES[dtype], shape=ir.Shape(shape), name=name)
        return self.b.initializer(data)


def _cast(b: Builder, rank: int, xs: list[Value], dtype: Arg) -> Value:
    assert isinstance(dtype, torch.dtype)
    return b.op("Cast", *xs, to=DTYPES[dtype].value)


def _transpose(b: Builder, rank: int, xs: list[Value], i: int, j: int) -> Value:
    perm = list(range(rank))
    perm[i], perm[j] = perm[j], perm[i]
    return b.op("Transpose", *xs, perm=perm)


# What a step of an expression becomes: the rank of what it gives, its inputs, its other arguments.
NODES: Mapping[str, Callable[..., Value]] = MappingProxyType(
    {
        "cast": _cast,
        "reshape": lambda b, rank, xs, shape: b.op("Reshape", *xs, shape),
        "transpose": _transpose,
        "expand": lambda b, rank, xs, shape: b.op("Expand", *xs, shape),
        "slice": lambda b, rank, xs, dim, start, end: b.op("Slice", *xs, [start], [end], [dim]),
        "concat": lambda b, rank, xs, dim: b.op("Concat", *xs, axis=dim),
        "neg": lambda b, rank, xs: b.op("Neg", *xs),
        "mixed": lambda b, rank, xs, *_: xs[0],
        "reciprocal": lambda b, rank, xs: b.op("Reciprocal", *xs),
    }
)
