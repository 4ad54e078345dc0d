"""Emit a program as an ONNX directory.

    model.onnx      standard ops of opset 23; symbolic sizes are dimension parameters
    weights/        the checkpoint's shards, hard-linked; model.onnx points into them
    derived.bin     small tensors made from stored ones
    manifest.json   the names, dtypes and shapes of inputs, caches and outputs
    config.json, tokenizer.json, ...   as the model has them

Inputs are those of the program and its caches, in its order; outputs are `logits` and each cache as
it now is, `<cache>_new`. onnx.load and onnx.checker refuse external data that has several hard
links; ONNX Runtime does not. Copy the directory to use them.
"""

import json
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch.fx import Node

from kvc8.backends.npu.files import Part, directory
from kvc8.backends.onnx.builder import Builder, Value, typed
from kvc8.backends.onnx.lowerings import LOWERINGS
from kvc8.backends.onnx.weights import Weights
from kvc8.ir.checkpoint import Checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.model_files import file_names, model_file
from kvc8.ir.program import Program, Stage, is_parameter, substitute, tensor_type, type_of
from kvc8.ir.types import IntType, dtype_name, show_dim

OPSET, IR_VERSION = 23, 11
STAGES = (Stage.CAPTURED, Stage.QUANTIZED)
CARRIED = (  # what the names of small files begin with
    *("config.json", "generation_config", "tokenizer", "special_tokens_map", "added_tokens"),
    *("chat_template.", "vocab.", "merges.txt"),
)


def emit(program: Program, checkpoint: Checkpoint, out: Path) -> None:
    """Write a captured or quantized program to the new directory `out`.

    Raises TargetError where the program is lowered for the NPU, holds an op that has no lowering,
    or `out` exists already; then nothing is written.
    """
    if program.stage not in STAGES:
        what = f"{program.stage.value}: ONNX is made from a captured or quantized program"
        raise TargetError(f"{what}; emit before lowering for the NPU")
    b = Builder()
    weights = Weights(b, checkpoint)
    inputs = _inputs(program, b, weights)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _lower(b, node)
    model = _model(program, b, inputs)
    with directory(out) as part:
        weights.write(part)
        part.write("model.onnx", ir.to_proto(model).SerializeToString())
        part.write("manifest.json", json.dumps(_manifest(program), indent=1).encode() + b"\n")
        _carry(part, checkpoint.path)


def _inputs(program: Program, b: Builder, weights: Weights) -> list[Value]:
    """Make every placeholder a value; gives those that are inputs of the model."""
    given = [*program.inputs(), *program.caches()]
    values = [b.input(node.name, tensor_type(node)) for node in given]
    b.values.update(zip(given, values, strict=True))
    for node in program.graph.nodes:
        if node.op == "placeholder" and is_parameter(node):
            b.scope = node.name
            b.values[node] = weights.parameter(node)
    return values


def _lower(b: Builder, node: Node) -> None:
    """Make a call of the program nodes of the model, the last of which has its name."""
    b.scope, b.origin = node.name, node.meta.get("origin", "")
    type_ = type_of(node)
    if isinstance(type_, IntType):  # known as an expression of the sizes of inputs
        b.values[node] = type_.value
        return
    assert not isinstance(node.target, str)
    if node.target not in LOWERINGS:
        name = str(node.target).removesuffix(".default")
        what = f"{node.name}: onnx has no lowering for {name}"
        raise TargetError(f"{what}; add one to backends/onnx/lowerings.py, or remove the call")
    args = [substitute(arg, b.values.__getitem__) for arg in node.args]
    kwargs = {name: substitute(arg, b.values.__getitem__) for name, arg in node.kwargs.items()}
    made = LOWERINGS[node.target](b, node, *args, **kwargs)
    b.values[node] = made
    producer = made.producer() if isinstance(made, ir.Value) else None
    if producer and isinstance(made, ir.Value) and made.name == producer.name:
        typed(made, tensor_type(node)).name = node.name


def _model(program: Program, b: Builder, inputs: list[Value]) -> ir.Model:
    outputs = _outputs(program, b)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=b.nodes,
        initializers=b.initializers,
        opset_imports={"": OPSET},
        name=program.stage.value,
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="kvc8")
    RemoveUnusedNodesPass()(model)  # a dequantized cache of which only pages are read, say
    return model


def _outputs(program: Program, b: Builder) -> list[Value]:
    """The outputs under their names; each must be made by a node, and be no other output."""
    [output] = program.graph.find_nodes(op="output")
    b.scope, b.origin = "output", ""
    outputs: list[Value] = []
    for node, name in zip(output.args[0], _output_names(program), strict=True):
        value = b.value(node)
        while value.producer() is None or value in outputs:
            value = b.op("Identity", value)
        typed(value, tensor_type(node)).name = name
        outputs.append(value)
    return outputs


def _output_names(program: Program) -> list[str]:
    """The logits, what a reader added to watch (under its node's name), and the caches."""
    [output] = program.graph.find_nodes(op="output")
    caches = [f"{cache.name}_new" for cache in program.caches()]
    watched = output.args[0][1 : len(output.args[0]) - len(caches)]
    return ["logits", *(f"{node.name}_seen" for node in watched), *caches]


def _manifest(program: Program) -> dict[str, object]:
    [output] = program.graph.find_nodes(op="output")
    outputs = zip(_output_names(program), output.args[0], strict=True)
    return {
        "format": "kvc8-onnx",
        "version": 1,
        "flavor": "standard",
        "inputs": [_entry(node.name, node) for node in program.inputs()],
        "caches": [_entry(node.name, node) for node in program.caches()],
        "outputs": [_entry(name, node) for name, node in outputs],
    }


def _entry(name: str, node: Node) -> dict[str, object]:
    type_ = tensor_type(node)
    shape = [d if isinstance(d, int) else show_dim(d) for d in type_.shape]
    return {"name": name, "dtype": dtype_name(type_.dtype), "shape": shape}


def _carry(part: Part, model: Path) -> None:
    """Copy what a tokenizer and a reader of the config need."""
    for name in file_names(model):
        file = model_file(model, name) if name.startswith(CARRIED) else None
        if file is not None:
            part.write(name, file.read_bytes())
