"""Copy a node that torch.export made into a program, in the form that passes rely on.

torch.export leaves several spellings of one thing and some that say nothing. A program has one:

    view, flatten, _unsafe_view       -> aten.reshape, its shape all ints with at most one -1
    contiguous, clone, alias, detach  -> their argument; values have no memory layout here
    to.device, to.dtype, _to_copy     -> aten.to.dtype, or their argument where nothing changes
    _assert_tensor_metadata, ...      -> nothing
    device, layout, pin_memory        -> left out; a program runs where its inputs are
    dropout in evaluation             -> its argument
    topk, in whatever order           -> topk, the largest first
    a new tensor filled part by part  -> aten.cat of the parts (ir/capture/joined.py)
    div_, scatter_, index_put_, ...   -> what gives the same and writes nowhere; whoever reads the
                                         written tensor after that reads its result
"""

import operator

import torch
from torch import SymInt
from torch._ops import OpOverload
from torch.fx import Node

from kvc8.ir.capture.joined import joined
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program, op_name, substitute, tensor_type

ATEN = torch.ops.aten
RESHAPES = (
    ATEN.view.default,
    ATEN.reshape.default,
    ATEN._unsafe_view.default,
    ATEN.flatten.using_ints,
    ATEN.unflatten.int,
)
SAME = (
    ATEN.contiguous.default,
    ATEN.clone.default,
    ATEN.alias.default,
    ATEN.detach.default,
    ATEN.detach_.default,
    ATEN.lift_fresh_copy.default,
    ATEN.dropout.default,
)
CASTS = (
    ATEN.to.dtype,
    ATEN.to.device,
    ATEN.to.dtype_layout,
    ATEN.to.other,
    ATEN._to_copy.default,
)
CHECKS = (
    ATEN._assert_tensor_metadata.default,
    ATEN._assert_scalar.default,
    ATEN.sym_constrain_range_for_size.default,
)
ON_HOST = (operator.add, operator.sub, operator.mul, operator.floordiv, ATEN.sym_size.int)
PLACE = ("device", "layout", "pin_memory")


def copy_call(program: Program, node: Node, env: dict[Node, Node], origin: str) -> None:
    """Append an exported call to a program whose nodes `env` gives; enters its result in `env`."""
    if node.target in CHECKS:
        return
    if node.target in SAME:
        env[node] = env[node.all_input_nodes[0]]
        return
    made = _reshape(program, node, env) or _cast(program, node, env) or _joined(program, node, env)
    made = made or _plain(program, node, env)
    if _writes(node):
        env[node.all_input_nodes[0]] = made
    if made.op == "call_function" and "origin" not in made.meta:
        made.meta["origin"] = origin
    env[node] = made


def _plain(program: Program, node: Node, env: dict[Node, Node]) -> Node:
    assert callable(node.target)
    args = tuple(substitute(arg, env.__getitem__) for arg in node.args)
    kwargs = {
        name: substitute(arg, env.__getitem__)
        for name, arg in node.kwargs.items()
        if name not in PLACE
    }
    if node.target is ATEN.topk.default:
        args = args[:4]
    target = _functional(node) if _writes(node) else node.target
    return program.append(target, args, kwargs, op_name(target))  # type: ignore[arg-type]


def _writes(node: Node) -> bool:
    """Whether a call writes to its first argument and gives that."""
    return isinstance(node.target, OpOverload) and node.target._schema.name.endswith("_")


def _functional(node: Node) -> OpOverload:
    """The op that gives what an op in place writes; of a tensor that is no part of another."""
    assert isinstance(node.target, OpOverload)
    written = node.all_input_nodes[0]
    whole = written.op == "call_function" and not (
        isinstance(written.target, OpOverload) and written.target.is_view
    )
    packet = getattr(torch.ops.aten, op_name(node.target).removesuffix("_"), None)
    found = getattr(packet, node.target._overloadname, None)
    if not whole or not isinstance(found, OpOverload):
        what = f"{node.target} writes to a part of a tensor"
        raise ModelError(node.name, what, "use a model that does not")
    return found


def _reshape(program: Program, node: Node, env: dict[Node, Node]) -> Node | None:
    """A reshape to known sizes; where several are not known, the call stays as it is."""
    shape = list(node.meta["val"].shape) if node.target in RESHAPES else []
    if node.target not in RESHAPES or sum(isinstance(size, SymInt) for size in shape) > 1:
        return None
    sizes = [-1 if isinstance(size, SymInt) else size for size in shape]
    x = env[node.all_input_nodes[0]]
    return program.append(ATEN.reshape.default, (x, sizes), {}, "reshape")


def _cast(program: Program, node: Node, env: dict[Node, Node]) -> Node | None:
    if node.target not in CASTS:
        return None
    x, dtype = env[node.all_input_nodes[0]], node.meta["val"].dtype
    if tensor_type(x).dtype is dtype:
        return x
    return program.append(ATEN.to.dtype, (x, dtype), {}, "to")


def _joined(program: Program, node: Node, env: dict[Node, Node]) -> Node | None:
    found = joined(node)
    if found is None:
        return None
    parts, dim = found
    return program.append(ATEN.cat.default, ([env[part] for part in parts], dim), {}, "cat")
