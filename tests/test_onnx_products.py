"""Products of int8 codes are exact in ONNX Runtime on every CPU, in every flavor, at their ends."""

import itertools

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.onnx_models import QUANTIZED, compiled, quantized

from kvc8.backends.onnx import runner
from kvc8.backends.onnx.builder import IR_VERSION, OPSET, Builder
from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.lowered import emit_lowered
from kvc8.backends.onnx.mixed import mixed_is_exact
from kvc8.backends.onnx.products import point, unsigned
from kvc8.backends.onnx.runner import load
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.text import parse
from kvc8.passes import pipeline
from kvc8.passes.options import Options

UINT8 = onnx.TensorProto.UINT8
# Of a row and a column: what makes all pairs of products as large as they get, of either sign, and
# what makes neighbors cancel.
CODES = {
    "highest": lambda count, _: torch.full((count,), 127),
    "lowest": lambda count, _: torch.full((count,), -128),
    "in turn": lambda count, _: torch.where(torch.arange(count) % 2 > 0, -128, 127),
    "ends": lambda count, random: torch.randint(0, 2, (count,), generator=random) * 255 - 128,
    "any": lambda count, random: torch.randint(-128, 128, (count,), generator=random),
}


def codes(count, width, seed):
    """Rows of each kind in turn, int8 [count, width]."""
    random, kinds = torch.Generator().manual_seed(seed), itertools.cycle(CODES.values())
    return torch.stack([next(kinds)(width, random) for _ in range(count)]).to(torch.int8)


def session(known=None):
    """One product of x [M, K] and a weight [K, N], which is given or known beforehand."""
    b = Builder()
    x, weight = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(shape))
        for name, shape in (("x", ("M", "K")), ("weight", ("K", "N")))
    )
    held = weight if known is None else b.constant(known)
    made = b.op("MatMulInteger", unsigned(b, x), unsigned(b, held), point(b), point(b))
    made.type, made.shape = ir.TensorType(ir.DataType.INT32), ir.Shape(("M", "N"))
    given = [x] if known is not None else [x, weight]
    graph = ir.Graph(
        given, [made], nodes=b.nodes, initializers=b.initializers, opset_imports={"": OPSET}
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


@pytest.mark.parametrize("known", [True, False], ids=["known", "given"])
def test_unsigned_products_are_exact_in_every_shape(known):
    """Of rows, columns and widths beside those that a kernel takes at once, and a wide one."""
    given = None if known else session()
    for width, columns in itertools.product((1, 2, 3, 4, 7, 16, 33, 65, 4097), (1, 5, 17, 48)):
        weight = codes(columns, width, seed=1).T.contiguous()
        made = session(weight) if given is None else given
        for rows in (1, 2, 6, 37):
            x = codes(rows, width, seed=2)
            inputs = {"x": x.numpy()} if known else {"x": x.numpy(), "weight": weight.numpy()}
            [got] = made.run(None, inputs)
            assert torch.equal(torch.from_numpy(got).long(), x.long() @ weight.long())


def test_mixed_products_are_exact_where_the_cpu_has_vnni_or_no_avx2():
    """As the session asks; this asks torch what the CPU has."""
    found = torch.cpu.get_capabilities()
    old = found["architecture"] != "x86_64" or not found["avx2"]
    assert mixed_is_exact() == (old or found["avx512_vnni"] or found["avx_vnni"])


LINEAR = """
def quantized(x: i8[1, T, 4097], w: i8[7, 4097], deq: f32[7], added: i32[7]):
    linear: f32[1, T, 7] = kvc8.quant_linear(x, w, deq, {bias}, f32)
    return [linear]
"""
MATMUL = """
def lowered(x: i8[T, 4097], w: i8[4097, 7], deq: f32[7], added: i32[7]):
    linear: f32[T, 7] = npu.npu_quant_matmul(x, w, deq, bias={bias}, output_dtype=6)
    return [linear]
"""
FLAVORS = [
    ("standard", "added"),
    ("standard", None),
    ("gqa", None),  # which multiplies a bias apart, and so rounds otherwise
    ("lowered", "added"),
    ("lowered", None),
]
ROWS = (1, 37)


def linear(flavor, bias, out, stored):
    """Write a program of one linear, 4097 wide, as a model."""
    program = parse((MATMUL if flavor == "lowered" else LINEAR).format(bias=bias))
    if flavor != "lowered":
        emit(program, open_checkpoint(stored), out, flavor)
        return
    emit_lowered({"model": program}, open_checkpoint(stored), out)


def inputs(flavor, rows, weight):
    """Those of such a linear, whose weight is [7, 4097]."""
    random, x = torch.Generator().manual_seed(4), codes(rows, 4097, seed=5)
    return {
        "x": x if flavor == "lowered" else x[None],
        "w": weight.T.contiguous() if flavor == "lowered" else weight,
        "deq": torch.rand(7, generator=random) * 1e-4,
        "added": torch.randint(-(2**20), 2**20, (7,), generator=random, dtype=torch.int32),
    }


def is_exact(session, flavor, bias, weight):
    """Whether a linear gives the sum of whole numbers, rounded to float32, times its scale."""
    for rows in ROWS:
        given = inputs(flavor, rows, weight)
        sums = given["x"].long() @ weight.T.long() + (given["added"] if bias else 0)
        if not torch.equal(session.run(given)[0], sums.float() * given["deq"]):
            return False
    return True


@pytest.mark.parametrize(("flavor", "bias"), FLAVORS)
def test_a_linear_is_exact_at_the_largest_sums(flavor, bias, stored, tmp_path):
    linear(flavor, bias, tmp_path / "out", stored)
    assert is_exact(load(tmp_path / "out", threads=1), flavor, bias, codes(7, 4097, seed=3))


@pytest.mark.parametrize(("flavor", "bias"), FLAVORS)
def test_a_session_may_mix_products(flavor, bias, stored, tmp_path, monkeypatch):
    """Of weights of 64 at most, for no two products of those and of 255 exceed int16.

    That it does is seen where the CPU saturates others.
    """
    linear(flavor, bias, tmp_path / "out", stored)
    monkeypatch.setattr(runner, "mixed_is_exact", lambda: True)
    session, weight = load(tmp_path / "out", threads=1), codes(7, 4097, seed=3)
    assert is_exact(session, flavor, bias, weight.clamp(-64, 64))
    assert is_exact(session, flavor, bias, weight) == mixed_is_exact()


STORED = """
def quantized(x: i8[1, T, 8], deq: f32[6], w: i8[6, 8] = stored("w8")):
    linear: f32[1, T, 6] = kvc8.quant_linear(x, w, deq, None, f32)
    return [linear]
"""


@pytest.mark.parametrize("flavor", ["standard", "gqa"])
def test_so_it_may_with_weights_that_lie_in_a_shard(flavor, stored, tmp_path, monkeypatch):
    """Codes of -65 at most are 63 at most when 128 higher: no two products exceed int16."""
    monkeypatch.setattr(runner, "mixed_is_exact", lambda: True)
    session = compiled(parse(STORED), stored, tmp_path / "out", flavor)
    x = torch.arange(-128, -64, dtype=torch.int8).reshape(1, 8, 8)
    weight = open_checkpoint(stored).read("w8")
    [got] = session.run({"x": x, "deq": torch.ones(6)})
    assert torch.equal(got, (x.long() @ weight.T.long()).float())


def products(file, optimized):
    """The operands' types of each product of integers that ONNX Runtime makes of a model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3  # it warns that what it writes is for this machine
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(optimized, load_external_data=False).graph
    kinds = {x.name: x.data_type for x in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "MatMulIntegerToFloat"):
            points = node.input[2:4] if node.op_type == "MatMulInteger" else node.input[4:6]
            yield node.op_type, kinds[node.input[1]], *(kinds[name] for name in points)
        else:
            assert not node.op_type.startswith(("QLinear", "QGemm", "QAttention", "ConvInteger"))
            assert not node.op_type.startswith(("DynamicQuantize", "MatMulNBits"))


@pytest.mark.slow  # three models are made
@pytest.mark.parametrize(
    ("flavor", "kind"), [("standard", ""), ("gqa", "ToFloat"), ("lowered", "")]
)
def test_the_optimizer_of_onnx_runtime_leaves_unsigned_products(flavor, kind, tmp_path):
    program, checkpoint = quantized(QUANTIZED[0]), open_checkpoint(QUANTIZED[0])
    if flavor == "lowered":
        phases, _ = pipeline.lower_for_npu(program, Options(prefill_kv="int8", fuse="on"))
        emit_lowered(phases, checkpoint, tmp_path / "out")
        name, count = "decode", 3 * 4  # of a layer: q, k and v; o; gate and up: down stays float
    else:
        emit(program, checkpoint, tmp_path / "out", flavor)
        name, count = "model", 6 * 4
    found = list(products(tmp_path / "out" / f"{name}.onnx", tmp_path / "optimized.onnx"))
    assert found == [(f"MatMulInteger{kind}", *[UINT8] * 3)] * count
