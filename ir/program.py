"""A program: an fx graph and its stage, and the few edits a pass may make to it.

Beside fx's own fields a node carries, in its meta:

    type     what it gives (ir/types.py)
    origin   the module of the model it came from, "model.layers.3.self_attn"; "" where none
    expression   parameters and caches only: what it is made of (ir/expression.py)

A placeholder with an expression `cache(...)`, `cache_nz(heads)` or `cache_steps()` is a KV cache,
with any other expression a parameter, and without one an input of each step. The output lists the
logits and then each cache as it now is.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from operator import is_

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.graph import _Namespace
from torch.fx.node import Argument, Target, map_arg

from kvc8.ir.errors import IRError
from kvc8.ir.expression import Expression
from kvc8.ir.shapes import Op, Shapes, frozen
from kvc8.ir.types import TensorType, Type

CACHES = ("cache", "cache_nz", "cache_steps")  # expressions


class Stage(Enum):
    """How far down a program has come."""

    CAPTURED = "captured"  # what the checkpoint means, with a float cache
    QUANTIZED = "quantized"  # an int8 cache, made float again for whoever reads it
    LOWERING = "lowering"  # kvc8's ops and NPU ops side by side
    LOWERED = "lowered"  # NPU ops and ATen only


@dataclass
class Program:
    """What a pass edits, a backend emits and a CPU runs."""

    graph: Graph
    stage: Stage
    shapes: Shapes = field(default_factory=Shapes)
    _last: Node | None = field(default=None, repr=False)  # the last placeholder, to add after it
    # what calls were inferred from and the type that they gave, so that who asks again is told
    _inferred: dict[Node, tuple[tuple[object, ...], Type]] = field(default_factory=dict, repr=False)
    # what calls were when `verify` found them right, and what types all nodes had
    _right: dict[Node, tuple[object, ...]] = field(default_factory=dict, repr=False)
    _types: dict[Node, object] = field(default_factory=dict, repr=False)
    _named: int = field(default=-1, repr=False)  # names in use when fx's table was made last

    def calls(self, *ops: Op) -> list[Node]:
        """Every call of one of `ops`, in order; the graph may be edited while going over them."""
        if len(ops) == 1:
            return self.graph.find_nodes(op="call_function", target=ops[0])
        return [node for node in self.graph.nodes if is_call(node, *ops)]

    def inputs(self) -> list[Node]:
        """The inputs of a step, without parameters and caches."""
        return [n for n in self.placeholders() if "expression" not in n.meta]

    def parameters(self) -> list[Node]:
        """The placeholders made from the checkpoint."""
        return [n for n in self.placeholders() if is_parameter(n)]

    def caches(self) -> list[Node]:
        """The KV caches: of each layer K, then V; after all of them scales of tokens, if any."""
        return [n for n in self.placeholders() if is_cache(n)]

    def placeholders(self) -> list[Node]:
        """The inputs, caches and parameters, in order."""
        return self.graph.find_nodes(op="placeholder")

    def call(
        self,
        before: Node,
        op: Op,
        *args: Argument,
        name: str = "",
        kwargs: Mapping[str, Argument] | None = None,
    ) -> Node:
        """Put op(*args) ahead of a node, of whose origin it is, and infer its type."""
        with self.graph.inserting_before(before):
            node = self.append(op, args, kwargs or {}, name or op_name(op))
        node.meta["origin"] = before.meta.get("origin", "")
        return node

    def append(
        self, op: Op, args: tuple[Argument, ...], kwargs: Mapping[str, Argument], name: str
    ) -> Node:
        """Put a call at the graph's insertion point and infer its type."""
        node = _create(self.graph, "call_function", op, args, kwargs, name)
        node.meta["type"] = self.infer(node)
        return node

    def placeholder(
        self,
        name: str,
        type_: Type,
        expression: Expression | None = None,
        before: Node | None = None,
    ) -> Node:
        """Add an input after the last input, a parameter or cache after the last of all.

        Or `before` another, as a cache that is to come in its place in the order of the caches.
        """
        last = (
            self._last_placeholder()
            if expression is not None
            else next(reversed(self.inputs()), None)
        )
        at = before or (None if last else next(iter(self.graph.nodes), None))
        with (
            self.graph.inserting_before(at) if at or not last else self.graph.inserting_after(last)
        ):
            node = self.graph.placeholder(name)
        if node.next.op != "placeholder":
            self._last = node
        node.meta["type"] = type_
        if expression is not None:
            node.meta["expression"] = expression
        return node

    def _last_placeholder(self) -> Node | None:
        if self._last is None or self._last._erased:
            return next(reversed(self.placeholders()), None)
        return self._last

    def drop_dead_calls(self) -> None:
        """Remove the calls that nothing uses and that write to nothing."""
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not node.users and not _writes(node.target):
                self.graph.erase_node(node)

    def forget_names(self) -> None:
        """Forget the names of nodes that are gone: what is made next is named by the text alone.

        fx numbers new names after all that it ever gave, and a text that is read back has no past.
        """
        if len(self.graph._graph_namespace._used_names) == self._named == len(self.graph.nodes):
            return  # no node was made or removed since
        names = _Namespace()
        for node in self.graph.nodes:  # what create_name does for a name that is free, in less time
            names._used_names.add(node.name)
            base, _, number = node.name.rpartition("_")
            if base and number.isdigit():
                names._base_count[base] = int(number)
            else:
                names._base_count.setdefault(node.name, 0)
        self.graph._graph_namespace = names
        self._named = len(names._used_names)

    def drop_unused_parameters(self) -> None:
        """Remove the parameters that nothing uses; inputs and caches stay."""
        for node in self.placeholders():
            if not node.users and is_parameter(node):
                self.graph.erase_node(node)

    def infer(self, node: Node) -> Type:
        """Work a node's type out from its arguments': again, where anything of them is another."""
        given = _given(node)
        known = self._inferred.get(node)
        if known is None or not all(map(is_, known[0], given)):
            known = self._inferred[node] = given, self._infer(node)
        return known[1]

    def unverified(self) -> Iterator[Node]:
        """The calls that are not all that they were when they were last `marked_right`, in order.

        That is the stage, a call's op, its arguments, their types and its own: the same objects,
        none of which can be changed in place.
        """
        right, stage = self._right, self.stage
        types, retyped = dict[Node, object](), set[Node]()
        for node in self.graph.nodes:
            types[node] = type_ = node.meta.get("type")
            if self._types.get(node) is not type_:
                retyped.add(node)
            if node.op != "call_function":
                continue
            known = right.get(node)
            if (
                known is None
                or known[0] is not stage
                or known[1] is not type_
                or known[2] is not node.target
                or known[3] is not node.args
                or known[4] is not node.kwargs
                or (retyped and not retyped.isdisjoint(node._input_nodes))
            ):
                yield node
        self._types = types  # where one was refused, what came after it was not looked at

    def mark_right(self, node: Node) -> None:
        """Remember a call as it is."""
        self._right[node] = self.stage, node.meta.get("type"), node.target, node.args, node.kwargs

    def _infer(self, node: Node) -> Type:
        assert callable(node.target)
        args = [substitute(arg, type_of) for arg in node.args]
        kwargs = {name: substitute(arg, type_of) for name, arg in node.kwargs.items()}
        try:
            return self.shapes.infer(node.target, tuple(args), kwargs)
        except IRError as error:
            raise error.within(node.name) from error

    def copy(self) -> "Program":
        """Another program of the same nodes, which may be edited apart; it shares the types."""
        made, nodes = Program(Graph(), self.stage, self.shapes), dict[Node, Node]()
        for node in self.graph.nodes:
            twin = nodes[node] = _twin(made.graph, node, nodes)
            given, type_ = self._inferred.get(node, ((), ()))
            if given and all(map(is_, given, _given(node))):
                made._inferred[twin] = _given(twin), type_
        return made


def _create(
    graph: Graph,
    kind: str,
    target: Target,
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument],
    name: str,
) -> Node:
    """A node as Graph.create_node makes it, in less time.

    It would look through the arguments for sizes of torch's own, which no program has.
    """
    node = graph.create_node(kind, target, (), {}, name)
    node.args = args
    if kwargs:
        node.kwargs = dict(kwargs)
    return node


def _twin(graph: Graph, node: Node, nodes: Mapping[Node, Node]) -> Node:
    """The copy of a node in another graph, where `nodes` are those of its arguments."""
    args = map_arg(node.args, nodes.__getitem__)
    kwargs = map_arg(node.kwargs, nodes.__getitem__) if node.kwargs else {}
    twin = _create(graph, node.op, node.target, args, kwargs, node.name)
    twin.meta = copy(node.meta)
    return twin


def kind_of(node: Node) -> object:
    """Equal for two calls of one op with equal constants, and tensors of equal types."""
    args = substitute(node.args, type_of)
    kwargs = {name: substitute(arg, type_of) for name, arg in node.kwargs.items()}
    return node.target, frozen(args), frozen(kwargs)


def _given(node: Node) -> tuple[object, ...]:
    """All that a call's type is inferred from; equal where each item is the same object."""
    types = [taken.meta.get("type") for taken in node._input_nodes]
    return node.target, node.args, node.kwargs, *types


def _writes(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def is_call(node: object, *ops: Op) -> bool:
    """Whether something is a node that calls one of `ops`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in ops


def is_cache(node: Node) -> bool:
    """Whether a node is a KV cache as a step finds it."""
    return _made_by(node) in CACHES


def is_nz(node: Node) -> bool:
    """Whether a node is a KV cache in NZ format (ir/nz.py)."""
    return _made_by(node) == "cache_nz"


def is_parameter(node: Node) -> bool:
    """Whether a node is made from the checkpoint."""
    return _made_by(node) not in (None, *CACHES)


def _made_by(node: Node) -> str | None:
    """The name of a placeholder's expression; None where it has none."""
    made = node.meta.get("expression") if node.op == "placeholder" else None
    return made.op if isinstance(made, Expression) else None


def op_name(op: Op) -> str:
    """What an op is called, without namespace and overload."""
    if isinstance(op, OpOverload):
        return str(op._schema.name.split("::")[1])
    return str(getattr(op, "__name__", op))


def substitute(arg: object, value: Callable[[Node], object]) -> object:
    """An argument with each node in it replaced; fx's map_arg, for values that fx does not know."""
    if isinstance(arg, Node):
        return value(arg)
    return type(arg)(substitute(a, value) for a in arg) if isinstance(arg, tuple | list) else arg


def type_of(node: Node) -> Type:
    """What a node gives."""
    if "type" not in node.meta:
        raise IRError(node.name, "has no type", "make nodes with Program.call")
    found: Type = node.meta["type"]
    return found


def tensor_type(node: object) -> TensorType:
    """What a node gives, where that must be one tensor."""
    if not isinstance(node, Node):
        raise IRError(
            f"{node!r}", "a constant where a tensor is wanted", "capture it as a parameter"
        )
    found = type_of(node)
    if not isinstance(found, TensorType):
        raise IRError(node.name, f"gives {found} where a tensor is wanted", "take one item of it")
    return found


def argument(node: Node, index: int) -> Node:
    """A node's argument, which must be a node."""
    if index >= len(node.args) or not isinstance(node.args[index], Node):
        raise IRError(node.name, f"argument {index} is no tensor", "capture it as one")
    found = node.args[index]
    assert isinstance(found, Node)
    return found


def unshaped(node: Node) -> Node:
    """What a node is a reshape of, through any number of them; itself where it is none."""
    while is_call(node, torch.ops.aten.reshape.default):
        node = argument(node, 0)
    return node


def expression_of(node: Node) -> Expression:
    """What a parameter or cache is made of."""
    if "expression" not in node.meta:
        raise IRError(node.name, "is no parameter", "give it an expression")
    found: Expression = node.meta["expression"]
    return found


def users(node: Node) -> Iterator[Node]:
    """The calls that use a node; the output does not count."""
    yield from [user for user in node.users if user.op != "output"]
