"""Mixed products, uint8 by int8, where ONNX Runtime computes them exactly (see products.py).

It is asked for the largest sums before a model is loaded, for no flag of a CPU says what a release
of ONNX Runtime makes of it.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kvc8.backends.onnx.builder import IR_VERSION, OPSET, Builder, Value

ZERO_POINTS = {"MatMulInteger": 3, "MatMulIntegerToFloat": 5}  # which input is the weight's
# Of the trial. Kernels differ for one row and many; no size here is a multiple of what they take.
ROWS, WIDTH, COLUMNS = (1, 2, 37), 67, 49


def mix(model: ir.Model) -> None:
    """Give each product of a model of ours its weight as it is stored, in int8."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            if node.op_type in ZERO_POINTS:
                node.replace_input_with(1, _stored(node))
                node.replace_input_with(ZERO_POINTS[node.op_type], None)
    RemoveUnusedNodesPass()(model)


def _stored(product: ir.Node) -> Value:
    """The weight of a product as it was before `unsigned`."""
    value = product.inputs[1]
    for kind in ("BitwiseXor", "Cast"):
        producer = value.producer() if value else None
        assert producer is not None
        assert producer.op_type == kind
        value = producer.inputs[0]
    assert value is not None
    return value


def mixed_is_exact() -> bool:
    """Whether mixed products saturate nowhere: of few rows and many, of weights known or given."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    ends = np.where(np.arange(COLUMNS) % 2, -128, 127).astype(np.int8)
    weight = np.repeat(ends[None], WIDTH, axis=0)
    trial = ir.to_proto(_trial(weight)).SerializeToString()
    session = ort.InferenceSession(trial, options, providers=["CPUExecutionProvider"])
    want = WIDTH * 255 * ends.astype(np.int32)
    highest = [np.full((rows, WIDTH), 255, dtype=np.uint8) for rows in ROWS]
    found = [sums for a in highest for sums in session.run(None, {"a": a, "weight": weight})]
    return all(bool((sums == want).all()) for sums in found)


def _trial(weight: NDArray[np.int8]) -> ir.Model:
    a = _typed(ir.Value(name="a"), ir.DataType.UINT8, WIDTH)
    given = _typed(ir.Value(name="weight"), ir.DataType.INT8, *weight.shape)
    b = Builder()
    known = b.constant(torch.from_numpy(weight))
    sums = [b.op("MatMulInteger", a, w) for w in (known, given)]
    for value in sums:
        _typed(value, ir.DataType.INT32, COLUMNS)
    graph = ir.Graph(
        [a, given], sums, nodes=b.nodes, initializers=b.initializers, opset_imports={"": OPSET}
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def _typed(value: Value, dtype: ir.DataType, *shape: int) -> Value:
    """A value of a type; of one size given, it has any number of rows."""
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape if len(shape) == 2 else ("M", *shape))
    return value
