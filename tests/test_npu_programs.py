"""Every NPU call of every lowered program fits the schema that torch_npu 2.13.0 has for it."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.onnx_models import captured
from torch.fx import Node

from kvc8.ir.npu import SCHEMAS
from kvc8.ir.program import Program, type_of
from kvc8.ir.text import parse
from kvc8.ir.types import IntsType, IntType, TensorType
from kvc8.passes import pipeline
from kvc8.passes.options import Options

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
MODELS = ["llama_fp16_m3", "qwen2_fp16_none_asym", "v1_qwen2_fp16_w8a8c8"]
DTYPES = [torch.float16, torch.bfloat16]
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


CALL = """
def lowered(x: f16[T, 64], s: f32[64] = stored("s")):
    codes: i8[T, 64] = npu.npu_quantize(x, s, None, 1, -1, True)
    return [codes]
"""


def test_a_call_that_does_not_fit_is_noticed() -> None:
    program = parse(CALL)
    node, *_ = npu_calls(program)
    x, s, *_ = node.args
    assert misfits(node) == []
    node.args = (x, s, 0.5, 1)
    assert misfits(node) == ["zero_points is 0.5"]
    node.args, node.kwargs = (x, s, None), {"div": True}
    assert misfits(node) == ["dtype is missing", "div is unknown"]
    node.args, node.kwargs = (x, s, None, 1, -1, True, 0), {}
    assert misfits(node) == ["7 arguments"]


@pytest.mark.slow  # captures models
@pytest.mark.parametrize("fuse", ["on", "off"])
@pytest.mark.parametrize("model", MODELS)
def test_every_call_fits_its_recorded_schema(model: str, fuse: str) -> None:
    seen: Counter[str] = Counter()
    for dtype in DTYPES:
        program = captured(CHECKPOINTS / model / "quant", dtype)
        pipeline.run(program, pipeline.QUANTIZE)
        for phase, lowered in pipeline.lower_for_npu(program, Options(fuse=fuse))[0].items():
            for node in npu_calls(lowered):
                assert misfits(node) == [], (phase, node.format_node())
                seen[str(node.target)] += 1
    assert len(seen) >= 4
    assert seen.total() > 100  # four layers, two phases, two dtypes
