"""Run in double precision what names other float dtypes, holding few weights at a time.

Under `Doubled` float64 stands for every float dtype that a call names. Rounding has then no say:
two runs that mean the same agree to many digits, and what differs is a fault.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.nn.functional import embedding, linear
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.checkpoint.unmapped import load, row_blocks, rows
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Expression
from kvc8.ir.precision.twins import make_exact, substituted
from kvc8.ir.program import (
    Program,
    argument,
    expression_of,
    is_call,
    is_parameter,
    substitute,
    tensor_type,
)
from kvc8.ir.run import Value, last_uses

F64 = torch.float64
BLOCK = 1 << 20  # bytes of a wide linear as it is stored
EMBEDDING, LINEAR = torch.ops.aten.embedding.default, torch.ops.aten.linear.default
WIDE = 4096  # outputs of a linear; of one that has more a few rows are held at a time
See = Callable[[Node, Callable[[Node], Value]], None]  # a call, and what gives values


class Doubled(TorchDispatchMode):
    """While it is entered, float64 stands for every float dtype that a call names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Compute a call in double precision."""
        named = {name: substituted(arg, _wider) for name, arg in (kwargs or {}).items()}
        return func(*(substituted(arg, _wider) for arg in args), **named)


def _wider(value: object) -> object:
    return F64 if isinstance(value, torch.dtype) and value.is_floating_point else value


@contextmanager
def doubled() -> Iterator[None]:
    """Compute in double precision, also where no dtype is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        with torch.no_grad(), Doubled():
            yield
    finally:
        torch.set_default_dtype(before)


def run_doubled(
    program: Program,
    given: Mapping[str, Value],
    stored: Mapping[str, StoredTensor],
    see: See | None = None,
) -> list[Tensor]:
    """The logits and the caches that a CAPTURED program gives, in float64.

    `given` are its inputs, and its caches in float64, by name. A parameter is made of `stored`
    tensors where it is first used, without rounding, and let go after its last use; `see` sees
    each call.
    """
    env: dict[Node, Value] = {}
    last = last_uses(program)
    for node in program.graph.nodes:
        if node.op == "output":
            return [env[item] for item in node.args[0]]  # type: ignore[misc]
        if node.op == "placeholder":
            env |= {} if is_parameter(node) else {node: given[node.name]}
            continue
        by_rows = _by_rows(node)
        for used in node.all_input_nodes:
            if used not in env and not (by_rows and used is node.args[by_rows.place]):
                env[used] = make_exact(expression_of(used), lambda name: load(stored[name]))
        table = stored[by_rows.name] if by_rows else None
        with doubled():
            env[node] = _evaluate(node, env, table)
        if see:
            see(node, env.__getitem__)
        for dead in last.get(node, ()):
            env.pop(dead, None)
    raise IRError("the program", "has no output", "end it with `return [...]`")


def _evaluate(call: Node, env: Mapping[Node, Value], table: StoredTensor | None) -> Value:
    """What a call gives; `table` is the parameter of which only some rows are to be held."""
    value = env.__getitem__
    if table is not None and is_call(call, EMBEDDING):
        held, places = rows_of(table, _tensor(value(argument(call, 1))))
        return embedding(places, held)
    if table is not None:
        x, _, *bias = call.all_input_nodes
        return in_blocks(_tensor(value(x)), table, *(_tensor(value(node)) for node in bias))
    args = [substitute(arg, value) for arg in call.args]
    kwargs = {name: substitute(arg, value) for name, arg in call.kwargs.items()}
    assert callable(call.target)
    return call.target(*args, **kwargs)


def _tensor(value: Value) -> Tensor:
    assert isinstance(value, Tensor)
    return value


@dataclass(frozen=True)
class _ByRows:
    """A parameter of which only some rows need be held at a time."""

    place: int  # among the arguments
    name: str  # of the stored tensor that it is


def _by_rows(call: Node) -> _ByRows | None:
    """The parameter of a call that need not be held whole, if there is one."""
    wide = is_call(call, LINEAR) and _is_wide(call)
    place = 0 if is_call(call, EMBEDDING) else 1 if wide else None
    name = None if place is None else _stored(argument(call, place))
    return None if place is None or name is None else _ByRows(place, name)


def _is_wide(call: Node) -> bool:
    outputs = tensor_type(call).shape[-1]
    return isinstance(outputs, int) and outputs > WIDE


def _stored(node: Node) -> str | None:
    """The stored tensor that a parameter is, whatever its dtype; None where it is not just one."""
    if not is_parameter(node):
        return None
    found = expression_of(node)
    inner = found.args[0] if found.op == "cast" else found
    is_one = isinstance(inner, Expression) and inner.op == "stored"
    return str(inner.args[0]) if is_one else None  # type: ignore[union-attr]


def rows_of(table: StoredTensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of an embedding that tokens have, in float64, and the tokens as places in these."""
    with _disable_current_modes():
        chosen, places = tokens.unique(return_inverse=True)
        return rows(table, chosen).to(F64), places


def in_blocks(x: Tensor, weight: StoredTensor, bias: Tensor | None = None) -> Tensor:
    """A linear of float64 x, with few rows of its weight in memory at a time."""
    with _disable_current_modes():
        whole, start = x.new_empty(*x.shape[:-1], weight.shape[0]), 0
        for block in row_blocks(weight, BLOCK):
            whole[..., start : start + len(block)] = linear(x, block.to(F64))
            start += len(block)
        return whole if bias is None else whole.add_(bias)
