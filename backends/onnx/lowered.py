"""Emit what was lowered for the NPU as ONNX: a model a phase, each NPU op a function.

    prefill.onnx chunk.onnx decode.onnx   standard ops of opset 23, and functions (functions.py)
    derived.bin                           small tensors made from stored ones
    weights/                              the checkpoint's shards, hard-linked; all point into them
    manifest.json                         the inputs, caches and outputs of each
    config.json, ...                      as the model has them

Inputs are those of the programs (backends/runtime/inputs.py); lists on the host are int64. A cache
that a program writes in place is an output as well, `<cache>_new`, as in the other flavors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch.fx import Node

from kvc8.backends.onnx.builder import Builder, Value
from kvc8.backends.onnx.emitter import (
    VERSION,
    assemble,
    carry,
    check_caches,
    lower,
    parameters,
    ports,
)
from kvc8.backends.onnx.functions import Body, Functions
from kvc8.backends.onnx.lowerings import LOWERINGS, Lowering
from kvc8.backends.onnx.npu_functions import BODIES, WRITES
from kvc8.backends.onnx.weights import Derived, Weights
from kvc8.ir import npu
from kvc8.ir.checkpoint.new_directory import new_directory
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, Stage, expression_of, tensor_type, type_of
from kvc8.ir.shapes import Op
from kvc8.ir.types import IntsType, TensorType

# What a model has whose NPU ops no function is written for, and those ops.
UNWRITTEN: Mapping[str, tuple[Op, ...]] = MappingProxyType(
    {
        "routes tokens to experts": (
            npu.npu_moe_gating_top_k,
            npu.npu_moe_gating_top_k_softmax,
            npu.npu_moe_init_routing_v2,
            npu.npu_grouped_matmul,
            npu.npu_moe_token_unpermute,
        ),
        "quantizes by token (W8A8_DYNAMIC, or --kv-scales-by token)": (npu.npu_dynamic_quant,),
    }
)


def emit_lowered(programs: Mapping[str, Program], checkpoint: Checkpoint, out: Path) -> None:
    """Write LOWERED programs by phase, "prefill", "chunk" and "decode", to the directory `out`.

    Raises TargetError where one is of another stage or calls an NPU op that has no function, or
    `out` exists already; then nothing is written.
    """
    derived = Derived()
    made = {phase: _model(phase, programs[phase], checkpoint, derived) for phase in programs}
    phases = {p: ports(programs[p], model) for p, (model, _) in made.items()}
    manifest = {"format": "kvc8-onnx", "version": VERSION, "flavor": "lowered", "phases": phases}
    with new_directory(out) as part:
        for phase, (model, weights) in made.items():
            weights.write(part)
            part.write(f"{phase}.onnx", ir.to_proto(model).SerializeToString())
        part.write("manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
        carry(part, checkpoint.path)


def _model(
    phase: str, program: Program, checkpoint: Checkpoint, derived: Derived
) -> tuple[ir.Model, Weights]:
    if program.stage is not Stage.LOWERED:
        do = "run the passes of the npu target, or choose another flavor"
        raise TargetError(phase, f"is a {program.stage.value} program", do)
    check_caches(program, npu.npu_scatter_pa_kv_cache_functional)
    _check_written(program)
    b, functions = Builder(), Functions()
    weights = Weights(b, checkpoint, derived)
    inputs = _inputs(program, b)
    # The mask of sparse modes 3 and 4 says what the mode does, and no function reads it.
    parameters(
        b, weights, [n for n in program.parameters() if expression_of(n).op != "masked_above"]
    )
    table = lowerings(functions)
    for node in program.graph.nodes:
        if node.op == "call_function":
            lower(b, node, table)
    model = assemble(program, b, inputs, [*functions.made.values()])
    return model, weights


def _check_written(program: Program) -> None:
    for has, missing in UNWRITTEN.items():
        for node in program.calls(*missing):
            where = node.meta.get("origin") or node.name
            what = f"{has}, which --flavor lowered cannot write as ONNX yet"
            raise TargetError(where, what, "use --flavor standard")


def _inputs(program: Program, b: Builder) -> list[Value]:
    given = [*program.inputs(), *program.caches()]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            b.values[node] = b.input(node.name, _type(node)) if node in given else None
    return [b.value(node) for node in given]


def _type(node: Node) -> TensorType:
    found = type_of(node)
    if isinstance(found, IntsType):
        return TensorType(torch.int64, (found.length,))
    return tensor_type(node)


def lowerings(functions: Functions) -> Mapping[Op, Lowering]:
    """What each op becomes: ATen's as in the other flavors, the NPU's a call of a function."""

    def caller(op: Op, body: Body) -> Lowering:
        writes = WRITES.get(op, ())
        return lambda b, node, *_, **__: functions.call(b, node, body, writes)

    return {**LOWERINGS, **{op: caller(op, body) for op, body in BODIES.items()}}
