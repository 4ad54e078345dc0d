"""A lowered program on fake tensors of device npu, and through torch.export."""

from collections.abc import Iterator
from typing import Any

import torch
import torch_npu  # noqa: F401  declares the ops and the device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvc8.ir.program import Program, substitute, tensor_type, type_of
from kvc8.ir.types import Dim, IntsType, IntType, TensorType, Type

SIZES = {"T": 6, "B": 2, "N": 7, "S": 128, "M": 3, "R": 2, "L": 300}


def number(d: Dim) -> int:
    """A dimension with the sizes put in."""
    if isinstance(d, int):
        return d
    # M8 and the like are blocks that a window touches.
    return int(d.subs({s: SIZES.get(str(s), SIZES[str(s)[0]]) for s in d.free_symbols}))


def expected(type_: Type) -> object:
    """What `described` says of a value of that type on device npu."""
    if isinstance(type_, tuple):
        return tuple(map(expected, type_)) or None
    if isinstance(type_, TensorType):
        return type_.dtype, tuple(map(number, type_.shape)), "npu"
    return number(type_.value) if isinstance(type_, IntType) else numbers(type_)


def described(value: object) -> object:
    """Dtype, shape and device of a tensor, or of each in a tuple; a number as it is."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.device.type
    return tuple(map(described, value)) if isinstance(value, tuple | list) else value


def numbers(type_: IntsType) -> list[int]:
    """A list of that type."""
    return [1] * number(type_.length)


def example(type_: Type, device: str) -> Any:
    """A tensor or a list of that type."""
    if isinstance(type_, IntsType):
        return numbers(type_)
    assert isinstance(type_, TensorType)
    return torch.zeros([number(d) for d in type_.shape], dtype=type_.dtype, device=device)


def is_npu(node: Node) -> bool:
    """Whether a node calls an op of torch_npu."""
    return getattr(node.target, "namespace", "") in ("npu", "atb")


def is_collective(node: Node) -> bool:
    """Whether a node speaks with the other ranks."""
    return getattr(node.target, "namespace", "") == "_c10d_functional"


def propagate(program: Program) -> Iterator[tuple[Node, str]]:
    """Every call, with how what it gives differs from its type ("" where it does not).

    Below autograd, for which npu_moe_token_unpermute has a kernel that asks the driver for the
    device; so is `export`.
    """
    values: dict[Node, Any] = {}
    with FakeTensorMode(), torch._C._AutoDispatchBelowAutograd():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = example(type_of(node), "npu")
            if node.op != "call_function":
                continue
            args = substitute(node.args, values.__getitem__)
            kwargs = {name: substitute(x, values.__getitem__) for name, x in node.kwargs.items()}
            values[node] = node.target(*args, **kwargs)
            found, wanted = described(values[node]), expected(type_of(node))
            yield node, "" if found == wanted else f"gives {found} and should give {wanted}"


def module(program: Program) -> tuple[GraphModule, list[Node]]:
    """The program with its lists of numbers put in, and the inputs that are left."""
    program = program.copy()
    for node in [n for n in program.graph.nodes if n.op == "placeholder"]:
        type_ = type_of(node)
        if isinstance(type_, IntsType):
            for user in list(node.users):
                given = user.kwargs.items()
                user.kwargs = {k: numbers(type_) if v is node else v for k, v in given}
            program.graph.erase_node(node)
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    return GraphModule({}, program.graph), inputs


def plain_sizes(program: Program) -> set[str]:
    """The sizes that are part of a number which an op's schema does not take as a symbol."""
    found = {"S"}
    for node in filter(is_npu, program.graph.nodes):
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        for of in given.get("qkv_size", ()):
            if isinstance(of, Node):
                found |= {str(size) for size in type_of(of).value.free_symbols}
    return found


def export(program: Program) -> str:
    """Export with dynamic sizes; gives what became a number, "" where nothing did.

    Those may that an op's schema takes as plain numbers: the size of a block, which is one number
    for the life of a cache, and the tokens where npu_qkv_rms_norm_rope_cache is called.
    """
    plain = plain_sizes(program)
    graph_module, inputs = module(program)
    with FakeTensorMode(shape_env=ShapeEnv()):
        args = tuple(example(type_of(node), "npu") for node in inputs)
    sizes = [
        {i: d for i, d in enumerate(tensor_type(n).shape) if not isinstance(d, int)} for n in inputs
    ]
    dynamic = tuple(dict.fromkeys(each, torch.export.Dim.AUTO) for each in sizes)
    with torch._C._AutoDispatchBelowAutograd():
        exported = torch.export.export(graph_module, args, dynamic_shapes=dynamic, strict=False)
    made = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"]
    fixed = [
        f"{d} of {node.name}"
        for node, each, value in zip(inputs, sizes, made, strict=True)
        for i, d in each.items()
        if not isinstance(value.shape[i], torch.SymInt) and str(d) not in plain
    ]
    return ", ".join(fixed)
