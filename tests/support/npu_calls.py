"""Whether calls of NPU ops fit the schemas that torch_npu has for them."""

import torch
from torch.fx import Node

from kvc8.ir.npu import SCHEMAS
from kvc8.ir.program import Program, type_of
from kvc8.ir.types import IntsType, IntType, TensorType

# By name with its namespace: the rows as text, parsed by torch and not taken from its dispatcher.
RECORDED = {row.partition("(")[0]: torch._C.parse_schema(row) for row in SCHEMAS}


def misfits(node: Node) -> list[str]:
    """The arguments of a call that its recorded schema does not have, or has of another type."""
    schema = RECORDED[node.target._schema.name]  # type: ignore[union-attr]
    positional = [a for a in schema.arguments if not a.kwarg_only]
    by_name = {a.name: a for a in schema.arguments}
    given = dict(zip([a.name for a in positional], node.args, strict=False)) | dict(node.kwargs)
    found = [f"{len(node.args)} arguments"] if len(node.args) > len(positional) else []
    found += [
        f"{name} is missing" for name in by_name.keys() - given.keys() if required(by_name[name])
    ]
    found += [f"{name} is unknown" for name in given.keys() - by_name.keys()]
    return found + [
        f"{name} is {value}"
        for name, value in given.items()
        if name in by_name and not fits(value, str(by_name[name].type))
    ]


def required(argument: torch._C.Argument) -> bool:
    return not argument.has_default_value()


def fits(value: object, type_: str) -> bool:
    """Whether an argument of a node is of a type as torch writes it: `Optional[Tensor]`."""
    if type_.startswith("Optional["):
        return value is None or fits(value, type_[len("Optional[") : -1])
    if isinstance(value, Node):
        kinds = {"Tensor": TensorType, "List[int]": IntsType, "int": IntType}
        return type_ in kinds and isinstance(type_of(value), kinds[type_])
    match type_:
        case "int":
            return type(value) is int
        case "float":
            return type(value) in (int, float)
        case "bool" | "str":
            return type(value).__name__ == type_
        case "List[int]":
            return isinstance(value, list | tuple) and all(fits(x, "int") for x in value)
    return False


def npu_calls(program: Program) -> list[Node]:
    named = [n for n in program.graph.nodes if n.op == "call_function"]
    return [n for n in named if getattr(n.target, "namespace", "") in ("npu", "atb")]
