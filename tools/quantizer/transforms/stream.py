"""The residual stream of a captured program: who reads it, who writes to it, what commutes.

Found by following what the embedding gives. A value is turned, if it is some x of the model times
R, where R is an orthogonal matrix over channels:

    what it meets                              what comes of it
    moves of tokens, casts                     is turned
    a factor that all of its channels share    is turned
    the mean of its squares                    the same as without R
    a weight for each channel, w or c + w      is turned once the weight is folded into who reads it
    a linear, an expert's too                  reads it: takes R's inverse, and that weight
    a sum with what linears or embeddings made writes to it: those take R
    anything else                              the model has no such rotation, and this says why

So a norm behind a linear, on the way to the stream, stops it: its weight does not commute with R,
and nothing comes after it that could take it (Gemma 2 and 3, OLMo 2, GLM-4). So does LayerNorm,
which takes a mean over channels away.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from kvc8.ir import mixture_ops
from kvc8.ir.program import (
    Program,
    argument,
    is_call,
    op_name,
    tensor_type,
)
from kvc8.ir.types import TensorType
from kvc8.tools.quantizer.sites import LINEAR
from kvc8.tools.quantizer.transforms.roles import Norm, NotTurned, Roles, Turn, where

ATEN = torch.ops.aten
EMBEDDING = ATEN.embedding.default
CASTS = (ATEN.to.dtype, ATEN.type_as.default)
MOVES = (
    *(ATEN.reshape.default, ATEN.unsqueeze.default, ATEN.transpose.int, ATEN.index.Tensor),
    *(ATEN.select.int, ATEN.slice.Tensor),
)
LINEARS = (LINEAR, mixture_ops.grouped_linear)
PRODUCTS = (ATEN.mul.Tensor, ATEN.mul.Scalar, ATEN.div.Tensor, ATEN.div.Scalar)
SUMS = (ATEN.add.Tensor, ATEN.sub.Tensor)


def width(program: Program) -> int:
    """How many channels the residual stream has."""
    tables = program.calls(EMBEDDING)
    if not tables:
        raise NotTurned("the model has no embedding")
    return int(str(tensor_type(tables[0]).shape[-1]))


def find_stream(program: Program, roles: Roles) -> None:
    """Put into `roles` what a rotation of the stream turns. Raises NotTurned where none can."""
    stream = _Stream(roles, width(program))
    stream.makers.add(program.calls(EMBEDDING)[0])
    order = [node for node in program.graph.nodes if node.op == "call_function"]
    place = {node: i for i, node in enumerate(order)}
    at = 0
    while at < len(order):
        new = stream.call(order[at])
        at = min((place[node] for node in new), default=at + 1)


@dataclass
class _Stream:
    """What is known of the values so far."""

    roles: Roles
    width: int
    makers: set[Node] = field(default_factory=set)  # linears and embeddings that write to it
    turned: dict[Node, Norm | None] = field(default_factory=dict)  # with the weight to fold
    squares: set[Node] = field(default_factory=set)

    def call(self, node: Node) -> set[Node]:
        """Take a call; gives makers that were not known as such, from which to go on."""
        if node in self.makers:
            self._made(node)
        if any(x in self.turned for x in node.all_input_nodes):
            return self._sum(node) if is_call(node, *SUMS) else self._take(node)
        if any(x in self.squares for x in node.all_input_nodes):
            self._square(node)
        return set()

    def _take(self, node: Node) -> set[Node]:
        """Take a call that reads the stream and gives no sum."""
        read = [x for x in node.all_input_nodes if x in self.turned]
        if is_call(node, *LINEARS) and read == [node.args[0]]:
            self._read(node, self.turned[read[0]])
        elif is_call(node, *PRODUCTS):
            self._product(node)
        elif is_call(node, ATEN.pow.Tensor_Scalar) and node.args[1] == 2 and self._bare(node):
            self.squares.add(node)
        elif self._moves(node):
            self.turned[node] = self.turned[read[0]]
        elif not self._beside(node):
            raise NotTurned(_why(node))
        return set()

    def _beside(self, node: Node) -> bool:
        """Whether a call takes of it what a rotation leaves: a dtype, which row is whose."""
        if is_call(node, ATEN.type_as.default):
            return node.args[0] not in self.turned
        return _item(node) and is_call(node.args[0], mixture_ops.route)

    def _bare(self, node: Node) -> bool:
        return self.turned[argument(node, 0)] is None

    def _moves(self, node: Node) -> bool:
        """Whether a call leaves each row whole."""
        if is_call(node, mixture_ops.combine, mixture_ops.route):
            return argument(node, 0) in self.turned
        if _item(node):
            return is_call(node.args[0], mixture_ops.route) and int(str(node.args[1])) == 0
        if not is_call(node, *MOVES, *CASTS) or node.args[0] not in self.turned:
            return False
        before, after = tensor_type(node.args[0]), tensor_type(node)
        last = len(before.shape) - 1
        if is_call(node, ATEN.transpose.int, ATEN.select.int, ATEN.slice.Tensor):
            taken = node.args[1:3] if is_call(node, ATEN.transpose.int) else node.args[1:2]
            if any(isinstance(dim, int) and dim % (last + 1) == last for dim in taken):
                return False
        if is_call(node, ATEN.index.Tensor):
            chosen = node.args[1]
            assert isinstance(chosen, list | tuple)
            return len(chosen) <= last
        return bool(_last(after) == self.width)

    def _square(self, node: Node) -> None:
        over = node.args[1] if len(node.args) > 1 else None
        means = is_call(node, ATEN.mean.dim, ATEN.sum.dim_IntList) and over in ([-1], (-1,))
        if not means:
            if not is_call(node, *CASTS):
                raise NotTurned(_why(node))
            self.squares.add(node)

    def _product(self, node: Node) -> None:
        x, other = node.args[0], node.args[1]
        if x is other and self._bare(node):
            self.squares.add(node)
            return
        if x not in self.turned:
            x, other = other, x
            if is_call(node, ATEN.div.Tensor):
                raise NotTurned(_why(node))
        assert isinstance(x, Node)
        if other in self.turned:
            raise NotTurned(_why(node))
        if _shared(other):
            self.turned[node] = self.turned[x]
            return
        if self.turned[x] is not None or is_call(node, ATEN.div.Tensor):
            raise NotTurned(f"{where(node)} scales the channels of the residual stream")
        assert isinstance(other, Node)
        self.turned[node] = self.roles.norm(node, other)

    def _sum(self, node: Node) -> set[Node]:
        new: set[Node] = set()
        for term in node.args[:2]:
            if not isinstance(term, Node):
                raise NotTurned(_why(node))
            new |= set(self._makers(term, node))
        if not new:
            self.turned[node] = None
        self.makers |= new
        return new

    def _makers(self, node: Node, into: Node) -> Iterator[Node]:
        """The linears and embeddings that a value is made of, if R passes from them to it."""
        if node in self.turned:
            if self.turned[node] is not None:
                raise NotTurned(f"{where(into)} adds to what a norm of the residual stream gives")
        elif is_call(node, *LINEARS, EMBEDDING) and _last(tensor_type(node)) == self.width:
            yield node
        elif is_call(node, *PRODUCTS):
            yield from self._makers(_wide(node), into)
        elif is_call(node, *SUMS):
            for term in node.all_input_nodes:
                yield from self._makers(term, into)
        elif is_call(node, mixture_ops.combine, *MOVES, *CASTS):
            yield from self._makers(argument(node, 0), into)
        else:
            what = f"gives {_op(node)} of something to the residual stream"
            raise NotTurned(f"{where(node)} {what}")

    def _made(self, node: Node) -> None:
        if is_call(node, EMBEDDING):
            self.roles.turn(node, 0, Turn(-1))
        else:
            self.roles.turn(node, 1, Turn(-2))
            if len(node.args) > 2 and isinstance(node.args[2], Node):
                self.roles.turn(node, 2, Turn(-1))
        self.turned[node] = None

    def _read(self, node: Node, norm: Norm | None) -> None:
        self.roles.turn(node, 1, Turn(-1, norm=norm))


def _wide(node: Node) -> Node:
    """The factor that is no number, nor one a token."""
    wide = [x for x in node.args[:2] if not _shared(x)]
    if len(wide) != 1 or not isinstance(wide[0], Node):
        what = "scales the channels of what is added to the residual stream"
        raise NotTurned(f"{where(node)} {what}")
    return wide[0]


def _why(node: Node) -> str:
    if is_call(node, ATEN.layer_norm.default, ATEN.mean.dim):
        return f"{where(node)} takes a mean over channels off the residual stream"
    return f"{where(node)} takes {_op(node)} of the residual stream"


def _op(node: Node) -> str:
    return op_name(node.target)  # type: ignore[arg-type]


def _item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _last(type_: TensorType) -> object:
    return type_.shape[-1] if type_.shape else None


def _shared(value: object) -> bool:
    """Whether a factor is one number, or one a token."""
    if not isinstance(value, Node):
        return True
    return _last(tensor_type(value)) in (None, 1)
