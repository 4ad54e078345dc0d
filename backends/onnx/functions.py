"""NPU ops as functions of an ONNX model: what each op does, spelled out in standard ops.

A call in the program is a call of a function of domain `npu` that has the op's name; a second body
of the same op, for other arguments, is `<op>_2` and so on. Runtimes that know no functions may
inline them. The bodies follow the emulation on a CPU, float32 for float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch._ops import OpOverload
from torch.fx import Node

from kvc8.backends.onnx.builder import OPSET, Builder, Value, typed
from kvc8.ir.errors import TargetError
from kvc8.ir.program import op_name, tensor_type, type_of
from kvc8.ir.types import IntsType, TensorType

DOMAIN = "npu"


class BodyBuilder(Builder):
    """The nodes of a function, whose constants are nodes too: a function has no initializers."""

    def initializer(self, data: ir.TensorProtocol) -> Value:
        """A constant of the body."""
        attribute = ir.Attr("value", ir.AttributeType.TENSOR, data)
        node = ir.Node("", "Constant", [], [attribute], name=f"Constant_{len(self.nodes)}")
        self.nodes.append(node)
        node.outputs[0].name = node.name
        return node.outputs[0]

    def again(self, value: Value) -> Value:
        """The same value under another name: a function gives nothing twice."""
        node = ir.Node("", "Identity", [value], name=f"Identity_{len(self.nodes)}")
        self.nodes.append(node)
        node.outputs[0].name = node.name
        return node.outputs[0]


@dataclass(frozen=True)
class FunctionCall:
    """A call of an op as its body sees it: tensors by argument name, and every other argument."""

    b: Builder  # of the body
    node: Node  # the call in the program
    tensors: Mapping[str, Value]
    types: Mapping[str, TensorType]
    others: Mapping[str, object]

    def tensor(self, name: str) -> Value:
        """A tensor that must be given."""
        if name not in self.tensors:
            raise self.refusal(f"without {name}")
        return self.tensors[name]

    def float32(self, name: str) -> Value:
        """A tensor that must be given, in float32."""
        return self.b.cast(self.tensor(name), self.types[name].dtype, torch.float32)

    def only(self, *known: str) -> None:
        """Refuse every other argument that is given and not its default."""
        for name in (*self.tensors, *self.others):
            if name not in known and self.others.get(name, "tensor") != default(self.node, name):
                raise self.refusal(f"with {name}")

    def number(self, name: str) -> int:
        """A whole number among the arguments."""
        found = self.others[name]
        assert isinstance(found, int)
        return found

    def refusal(self, how: str) -> TargetError:
        """The error at a call that no function does."""
        what = f"{op_name(self.node.target)} {how} has no ONNX function"  # type: ignore[arg-type]
        return TargetError(self.node.name, what, "add it to backends/onnx/npu_functions.py")


Body = Callable[[FunctionCall], Sequence[Value]]


def default(node: Node, name: str) -> object:
    """What an argument is where a call does not give it."""
    assert isinstance(node.target, OpOverload)
    [found] = [a for a in node.target._schema.arguments if a.name == name]
    return found.default_value if found.has_default_value() else None


def arguments(node: Node) -> Iterator[tuple[str, object]]:
    """The arguments of a call by name, in the order of its schema; defaults are left out."""
    assert isinstance(node.target, OpOverload)
    for i, declared in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            yield declared.name, node.args[i]
        elif declared.name in node.kwargs:
            yield declared.name, node.kwargs[declared.name]


@dataclass
class Functions:
    """The functions of one model in the making."""

    made: dict[tuple[str, bytes], ir.Function] = field(default_factory=dict)

    def call(self, b: Builder, node: Node, body: Body, writes: Sequence[str] = ()) -> object:
        """Call the function of a node; what it `writes` to is what it gave from then on.

        A body gives what the op gives, and after it the new value of each argument it writes to.
        """
        given = dict(arguments(node))
        nodes = {name: x for name, x in given.items() if isinstance(x, Node)}
        tensors = {n: v for n, x in nodes.items() if isinstance(v := b.values[x], ir.Value)}
        function, count = self._function(node, given, list(tensors), body)
        outputs = b.call(DOMAIN, function.name, *tensors.values(), outputs=count)
        for name, value in zip(writes, outputs[count - len(writes) :], strict=True):
            written = nodes[name]
            b.values[written] = typed(value, tensor_type(written))
        return _results(node, outputs[: count - len(writes)])

    def _function(
        self, node: Node, given: Mapping[str, object], tensors: list[str], body: Body
    ) -> tuple[ir.Function, int]:
        b = BodyBuilder()
        inputs = {name: ir.Value(name=name) for name in tensors}
        types = {name: _type(given[name]) for name in tensors}
        others = {name: x for name, x in given.items() if not isinstance(x, Node)}
        outputs = list(body(FunctionCall(b, node, inputs, types, others)))
        for i, value in enumerate(outputs):
            if value in inputs.values() or value in outputs[:i]:
                outputs[i] = b.again(value)
        assert isinstance(node.target, OpOverload)
        op = op_name(node.target)
        graph = ir.Graph([*inputs.values()], outputs, nodes=b.nodes, opset_imports={"": OPSET})
        function = ir.Function(DOMAIN, op, graph=graph, attributes=[])
        key = op, ir.serde.serialize_function(function).SerializeToString()
        known = sum(name == op for name, _ in self.made)
        if key not in self.made:
            function.name = f"{op}_{known + 1}" if known else op
            self.made[key] = function
        return self.made[key], len(outputs)


def _type(x: object) -> TensorType:
    assert isinstance(x, Node)
    found = type_of(x)
    if isinstance(found, IntsType):
        return TensorType(torch.int64, (found.length,))
    assert isinstance(found, TensorType)
    return found


def _results(node: Node, outputs: Sequence[Value]) -> object:
    found = type_of(node)
    types = found if isinstance(found, tuple) else (found,)
    for value, type_ in zip(outputs, types, strict=True):
        assert isinstance(type_, TensorType)
        typed(value, type_)
    return tuple(outputs) if isinstance(found, tuple) else outputs[0]
