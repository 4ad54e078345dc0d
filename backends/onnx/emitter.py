"""Emit a program as an ONNX directory.

    model.onnx      symbolic sizes are dimension parameters
    weights/        the checkpoint's shards, hard-linked; model.onnx points into them
    derived.bin     small tensors made from stored ones
    manifest.json   the names, dtypes and shapes of inputs, caches and outputs
    config.json, tokenizer.json, ...   as the model has them

The flavor `standard` has standard ops of opset 23 and takes what the program takes, in its order:

    input_ids      i64[T]     the new tokens of all sequences, end to end
    positions      i64[T]     where each stands in its sequence, from 0
    slot_mapping   i32[T]     the flat slot of the cache it goes to, or -1 for padding
    block_table    i32[B, M]  the blocks of each sequence
    seq_lens       i32[B]     tokens of each sequence with the new ones
    query_starts   i32[B + 1] where each sequence's new tokens begin, and the end of the last
    logits_rows    i64[R]     the tokens whose logits are wanted
    <cache>        [N, S, kv_heads, head_dim], k_cache_0, v_cache_0, ...: N blocks of S tokens

The flavor `gqa` is described in gqa.py. Outputs are `logits` [R, vocabulary] and each cache as it
now is, `<cache>_new`. onnx.load and onnx.checker refuse external data that has several hard
links; ONNX Runtime does not. Copy the directory to use them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch.fx import Node

from kvc8.backends.onnx import gqa
from kvc8.backends.onnx.builder import DTYPES, IR_VERSION, OPSET, Builder, Value, typed
from kvc8.backends.onnx.lowerings import LOWERINGS, Lowering
from kvc8.backends.onnx.weights import Derived, Weights
from kvc8.ir import ops
from kvc8.ir.checkpoint.model_files import file_names, model_file
from kvc8.ir.checkpoint.new_directory import PartialDirectory, new_directory
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, Stage, is_call, substitute, tensor_type, type_of, users
from kvc8.ir.shapes import Op
from kvc8.ir.types import IntType, dtype_name

Flavor = Literal["standard", "gqa"]

VERSION = 2  # of the manifest; 1 had products that are not exact on every CPU
STAGES = (Stage.CAPTURED, Stage.QUANTIZED)
CARRIED = (  # what the names of small files begin with
    *("config.json", "generation_config", "tokenizer", "special_tokens_map", "added_tokens"),
    *("chat_template.", "vocab.", "merges.txt"),
)


def emit(program: Program, checkpoint: Checkpoint, out: Path, flavor: Flavor = "standard") -> None:
    """Write a captured or quantized program to the new directory `out`.

    Raises TargetError where the program is lowered for the NPU, holds an op that has no lowering,
    does with its caches what the flavor cannot, or `out` exists already; then nothing is written.
    """
    if program.stage not in STAGES:
        what = "ONNX is made from a captured or quantized program"
        raise TargetError(program.stage.value, what, "emit before lowering for the NPU")
    check_caches(program, ops.cache_write)
    b = Builder()
    weights = Weights(b, checkpoint, Derived())
    inputs = gqa.inputs(program, b) if flavor == "gqa" else _inputs(program, b)
    parameters(b, weights, program.parameters())
    lowerings = gqa.LOWERINGS if flavor == "gqa" else LOWERINGS
    for node in program.graph.nodes:
        if node.op == "call_function":
            lower(b, node, lowerings)
    model = assemble(program, b, inputs)
    manifest = {
        "format": "kvc8-onnx",
        "version": VERSION,
        "flavor": flavor,
        **ports(program, model),
    }
    with new_directory(out) as part:
        weights.write(part)
        part.write("model.onnx", ir.to_proto(model).SerializeToString())
        part.write("manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
        carry(part, checkpoint.path)


def check_caches(program: Program, *writes: Op) -> None:
    """Refuse a cache that is read as it was before a write: the runner writes caches in place."""
    for cache in program.caches():
        calls = list(users(cache))
        if any(is_call(call, *writes) for call in calls) and len(calls) > 1:
            what = "is read as it was before a call writes to it"
            raise TargetError(cache.name, what, "read what the write gives")


def _inputs(program: Program, b: Builder) -> list[Value]:
    """Make the inputs and caches of the program inputs of the model."""
    given = [*program.inputs(), *program.caches()]
    values = [b.input(node.name, tensor_type(node)) for node in given]
    b.values.update(zip(given, values, strict=True))
    return values


def parameters(b: Builder, weights: Weights, nodes: Sequence[Node]) -> None:
    """Make parameters of a program values."""
    for node in nodes:
        b.scope = node.name
        b.values[node] = weights.parameter(node)


def lower(b: Builder, node: Node, lowerings: Mapping[Op, Lowering]) -> None:
    """Make a call of the program nodes of the model, the last of which has its name."""
    b.scope, b.origin = node.name, node.meta.get("origin", "")
    type_ = type_of(node)
    if isinstance(type_, IntType):  # known as an expression of the sizes of inputs
        b.values[node] = type_.value
        return
    assert not isinstance(node.target, str)
    if node.target not in lowerings:
        name = str(node.target).removesuffix(".default")
        where = "npu_functions.py" if name.startswith("npu.") else "lowerings.py"
        do = f"add one to backends/onnx/{where}, or remove the call"
        raise TargetError(node.name, f"onnx has no lowering for {name}", do)
    args = [substitute(arg, b.values.__getitem__) for arg in node.args]
    kwargs = {name: substitute(arg, b.values.__getitem__) for name, arg in node.kwargs.items()}
    made = lowerings[node.target](b, node, *args, **kwargs)
    b.values[node] = made
    producer = made.producer() if isinstance(made, ir.Value) else None
    if producer and isinstance(made, ir.Value) and made.name == producer.name:
        typed(made, tensor_type(node)).name = node.name


def assemble(
    program: Program, b: Builder, inputs: list[Value], functions: Sequence[ir.Function] = ()
) -> ir.Model:
    """The model of what a program's nodes have become."""
    outputs = _outputs(program, b)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=b.nodes,
        initializers=b.initializers,
        opset_imports={"": OPSET, **dict.fromkeys(sorted({n.domain for n in b.nodes} - {""}), 1)},
        name=program.stage.value,
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="kvc8", functions=functions)
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
        if value.type is None:  # a dense cache has its own type
            typed(value, tensor_type(node))
        value.name = name
        outputs.append(value)
    return outputs


def _output_names(program: Program) -> list[str]:
    """The logits, what a reader added to watch (under its node's name), and the caches."""
    [output] = program.graph.find_nodes(op="output")
    caches = [f"{cache.name}_new" for cache in program.caches()]
    watched = output.args[0][1 : len(output.args[0]) - len(caches)]
    return ["logits", *(f"{node.name}_seen" for node in watched), *caches]


def ports(program: Program, model: ir.Model) -> dict[str, object]:
    """What the manifest says of the inputs, caches and outputs of a model."""
    caches = {cache.name for cache in program.caches()}
    given = [(value.name in caches, _entry(value)) for value in model.graph.inputs]
    return {
        "inputs": [entry for is_cache, entry in given if not is_cache],
        "caches": [entry for is_cache, entry in given if is_cache],
        "outputs": [_entry(value) for value in model.graph.outputs],
    }


def _entry(value: Value) -> dict[str, object]:
    assert value.shape is not None
    [dtype] = [ours for ours, theirs in DTYPES.items() if theirs == value.dtype]
    shape = [d if isinstance(d, int) else d.value for d in value.shape]
    return {"name": value.name, "dtype": dtype_name(dtype), "shape": shape}


def carry(part: PartialDirectory, model: Path) -> None:
    """Copy what a tokenizer and a reader of the config need."""
    for name in file_names(model):
        file = model_file(model, name) if name.startswith(CARRIED) else None
        if file is not None:
            part.write(name, file.read_bytes())
