"""torchair's converters of NPU ops to GE, run without CANN."""

import operator
import tempfile
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
import torch_npu
import torch_npu.npu._backends
import torchair
from propagate import example, expected
from torch.fx import Graph, GraphModule, Node

from kvc8.ir.program import substitute, type_of
from kvc8.ir.types import TensorType

torchair.get_npu_backend()  # brings the modules below in
import torchair._ge_concrete_graph.compat_ir as compat  # noqa: E402
import torchair._ge_concrete_graph.fx2ge_converter as converter  # noqa: E402
from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef  # noqa: E402
from torchair.npu_export import _get_export_config  # noqa: E402


class Exporter:
    """Stands for torchair's own module, and keeps the graphs that would go to GE."""

    def __init__(self, real: object) -> None:
        self.real = real
        self.graphs: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def export(self, graph: bytes, _: object) -> None:
        """Keep a graph."""
        self.graphs.append(graph)


def answer_for_cann() -> Exporter:
    """Let torchair convert without CANN."""
    exporter = Exporter(converter._torchair)
    converter._torchair = exporter
    compat.is_cann_compat = lambda *_, **__: ""
    converter.initialize_graph_engine = lambda *_, **__: None
    torch_npu._C._npu_get_soc_version = lambda: 220  # Ascend910B
    torch_npu.npu._backends.get_soc_version = lambda: 220
    torch_npu.npu.get_device_name = lambda *_: "Ascend910B2"
    return exporter


def has_converter(op: object) -> bool:
    """Whether torchair converts an op, itself or what functionalization makes of it."""
    assert isinstance(op, torch._ops.OpOverload)
    forms = [op]
    namespace, name = op._schema.name.split("::")
    functional = getattr(getattr(torch.ops, namespace), f"{name.rstrip('_')}_functional", None)
    if op._schema.is_mutable and functional is not None:
        forms.append(functional.default)
    return any(converter._get_converter(form) is not None for form in forms)


def convert(graph_module: GraphModule, inputs: list[Node], exporter: Exporter) -> Counter[str]:
    """How many of each GE op torchair makes of a graph."""
    exporter.graphs.clear()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        config = _get_export_config(graph_module, folder, "program", torchair.CompilerConfig())
        args = [example(type_of(node), "cpu") for node in inputs]
        with suppress(converter.ExportSuccess):  # how torchair ends an export
            torchair.get_npu_backend(compiler_config=config)(graph_module, args)(*args)
    model = ModelDef()
    model.ParseFromString(exporter.graphs[0])
    return Counter(op.type for graph in model.graph for op in graph.op)


def alone(node: Node) -> tuple[GraphModule, list[Node]]:
    """A graph that makes one call of a program and gives all its results."""
    graph, made = Graph(), dict[Node, Any]()
    for used in node.all_input_nodes:
        made[used] = expected(type_of(used))
        if isinstance(type_of(used), TensorType):
            made[used] = graph.placeholder(used.name)
            made[used].meta["type"] = type_of(used)
    args = substitute(node.args, made.__getitem__)
    kwargs = {name: substitute(x, made.__getitem__) for name, x in node.kwargs.items()}
    call = graph.call_function(node.target, args, kwargs)
    outputs, inputs = type_of(node), [n for n in graph.nodes if n.op == "placeholder"]
    results = [call]
    if isinstance(outputs, tuple):  # () where the op only writes to its arguments
        items = [graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
        results = items or inputs
    graph.output(tuple(results))
    return GraphModule({}, graph), inputs
