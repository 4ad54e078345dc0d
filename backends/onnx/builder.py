"""Make ONNX nodes, one call each. A call that was made before gives the value it gave then.

So a lowering may work out again what another one has, the attention mask of a layer for instance,
and the model still holds it once.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import TargetError
from kvc8.ir.types import Dim, TensorType

Value: TypeAlias = ir.Value
Operand: TypeAlias = "ir.Value | Tensor | int | Sequence[int] | None"
Attribute: TypeAlias = "int | float | str | Sequence[int]"

OPSET, IR_VERSION = 23, 11
END = (1 << 63) - 1  # ONNX's Slice reads it as the end of the axis

DTYPES: Mapping[torch.dtype, ir.DataType] = MappingProxyType(
    {
        torch.float64: ir.DataType.DOUBLE,
        torch.float32: ir.DataType.FLOAT,
        torch.float16: ir.DataType.FLOAT16,
        torch.bfloat16: ir.DataType.BFLOAT16,
        torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
        torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
        torch.int64: ir.DataType.INT64,
        torch.int32: ir.DataType.INT32,
        torch.int16: ir.DataType.INT16,
        torch.int8: ir.DataType.INT8,
        torch.uint8: ir.DataType.UINT8,
        torch.bool: ir.DataType.BOOL,
    }
)


class Builder:
    """The nodes and constants of a model in the making, and its named sizes."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[Value] = []
        self.scope, self.origin = "", ""  # the program's node that is being lowered
        self.values: dict[Node, object] = {}  # what the program's nodes have become
        self._calls: dict[object, Sequence[Value]] = {}
        self._made: dict[object, Value] = {}  # constants
        self._sizes: dict[str, tuple[Value, int]] = {}

    def value(self, node: Node) -> Value:
        """What a node of the program, which gives one tensor, has become."""
        found = self.values[node]
        assert isinstance(found, ir.Value)
        return found

    def input(self, name: str, type_: TensorType) -> Value:
        """An input of the model; sizes that it is the first to name are read off it."""
        value = typed(ir.Value(name=name), type_)
        self.name_sizes(value, type_)
        return value

    def name_sizes(self, value: Value, type_: TensorType) -> None:
        """Read the sizes that a type names off a value of it, where nothing gives them yet."""
        for axis, d in enumerate(type_.shape):
            if not isinstance(d, int) and d.is_Symbol:
                self._sizes.setdefault(str(d), (value, axis))

    def op(self, kind: str, *inputs: Operand, **attributes: Attribute) -> Value:
        """What a node of one output gives. Ints and lists of ints stand for int64 constants."""
        [made] = self.call("", kind, *inputs, outputs=1, **attributes)
        return made

    def call(
        self, domain: str, kind: str, *inputs: Operand, outputs: int, **attributes: Attribute
    ) -> Sequence[Value]:
        """What a node of an op of any domain gives, which has so many outputs."""
        values = [self._operand(x) for x in inputs]
        frozen = tuple((k, _frozen(v)) for k, v in sorted(attributes.items()))
        key = domain, kind, tuple(values), frozen
        if key not in self._calls:
            name = f"{self.scope}/{kind}_{len(self.nodes)}"
            node = ir.node(kind, values, attributes, domain=domain, num_outputs=outputs, name=name)
            if self.origin:
                node.metadata_props["origin"] = self.origin
            for i, value in enumerate(node.outputs):
                value.name = f"{name}.{i}" if i else name
            self.nodes.append(node)
            self._calls[key] = node.outputs
        return self._calls[key]

    def cast(self, x: Value, old: torch.dtype, new: torch.dtype) -> Value:
        """The values of x, which are `old`, as `new`."""
        return x if old is new else self.op("Cast", x, to=DTYPES[new].value)

    def constant(self, tensor: Tensor) -> Value:
        """A small constant, kept in the model's own file."""
        raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        key = tensor.dtype, tuple(tensor.shape), raw
        if key not in self._made:
            name = f"constant_{len(self.initializers)}"
            data = ir.Tensor(
                tensor.numpy(), dtype=DTYPES[tensor.dtype], shape=ir.Shape(tensor.shape), name=name
            )
            self._made[key] = self.initializer(data)
        return self._made[key]

    def number(self, x: float, dtype: torch.dtype) -> Value:
        """A constant of no dimension."""
        if dtype is torch.bfloat16:  # which numpy does not have
            return self.cast(self.number(x, torch.float32), torch.float32, dtype)
        return self.constant(torch.tensor(x, dtype=dtype))

    def initializer(self, data: ir.TensorProtocol) -> Value:
        """A constant of the model, wherever its bytes lie."""
        value = ir.Value(
            name=data.name,
            type=ir.TensorType(data.dtype),
            shape=ir.Shape(data.shape.numpy()),
            const_value=data,
        )
        self.initializers.append(value)
        return value

    def size(self, d: Dim) -> Value:
        """A dimension, int64 [1], worked out from the shapes of the inputs."""
        if isinstance(d, int) or d.is_Integer:
            return self.constant(torch.tensor([int(d)]))
        if d.is_Symbol and str(d) in self._sizes:
            value, axis = self._sizes[str(d)]
            return self.op("Shape", value, start=axis, end=axis + 1)
        if d.is_Add or d.is_Mul:
            kind = "Add" if d.is_Add else "Mul"
            return reduce(lambda a, b: self.op(kind, a, b), map(self.size, d.args))
        raise TargetError(
            f"{self.scope}",
            f"onnx cannot work out the size {d}",
            "use sums and products of the sizes of inputs",
        )

    def shape(self, dims: Sequence[Dim]) -> Value:
        """A list of dimensions, int64 [n]."""
        known = [int(d) for d in dims if isinstance(d, int) or d.is_Integer]
        if len(known) == len(dims):
            return self.constant(torch.tensor(known, dtype=torch.int64))
        return self.op("Concat", *map(self.size, dims), axis=0)

    def _operand(self, x: Operand) -> Value | None:
        match x:
            case None | ir.Value():
                return x
            case Tensor():
                return self.constant(x)
        return self.constant(torch.tensor(x, dtype=torch.int64))


def typed(value: Value, type_: TensorType) -> Value:
    """The value, with its type written at it; symbolic dimensions keep their names."""
    value.type = ir.TensorType(DTYPES[type_.dtype])
    value.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in type_.shape])
    return value


def _frozen(attribute: Attribute) -> object:
    """An attribute that can be looked up in a table; 1, 1.0 and True are kept apart."""
    plain = attribute if isinstance(attribute, int | float | str) else tuple(attribute)
    return type(plain), plain
