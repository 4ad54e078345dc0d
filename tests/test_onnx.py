"""An ONNX model gives in ONNX Runtime what its program gives, and its int8 codes bit for bit."""

import functools
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from steps import step, values

from kvc8.backends.onnx import weights
from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.runner import Session, load
from kvc8.ir import ops
from kvc8.ir.capture import capture
from kvc8.ir.checkpoint import Checkpoint, open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program
from kvc8.ir.recipe import make
from kvc8.ir.run import run
from kvc8.ir.text import parse
from kvc8.passes.pipeline import QUANTIZE
from kvc8.passes.pipeline import run as run_passes

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
QUANTIZED = [
    CHECKPOINTS / "llama_fp16_m3" / "quant",  # symmetric
    CHECKPOINTS / "qwen2_fp16_none_asym" / "quant",  # with zero points and biases
]
UNIT = 2.0**-24  # half of what float32 resolves at 1: one rounding is off by at most this, relative
# A sum of 128 products is off by at most 128 units of its size, in whatever order it is taken. A
# token passes 3 of them a layer (projection, attention, MLP) and there are 4 layers.
BOUND = 3 * 4 * 128 * UNIT
TABLE = [[7, 2, 11, 5, 9]]


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compiled(program: Program, directory: Path, out: Path) -> Session:
    emit(program, open_checkpoint(directory), out)
    return load(out, threads=1)


@dataclass(frozen=True)
class Emitted:
    program: Program
    directory: Path  # of the model
    out: Path


@pytest.fixture(scope="session")
def emitted(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Emitted]:
    """`emitted(kind, tied=False)` and `emitted(directory)`, which is quantized; made once each."""

    @functools.cache
    def emitted(model: str | Path, tied: bool = False) -> Emitted:
        directory = tiny_model(model, tied=tied) if isinstance(model, str) else model
        checkpoint = open_checkpoint(directory)
        program = capture(checkpoint, dtype=torch.float32)
        if isinstance(model, Path):
            run_passes(program, QUANTIZE)
        out = tmp_path_factory.mktemp("onnx") / "out"
        emit(program, checkpoint, out)
        return Emitted(program, directory, out)

    return emitted


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for programs written by hand."""
    directory = tmp_path_factory.mktemp("stored")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=random)
    save_file(
        {
            "rows": rows,
            "half": rows.half(),
            "bf16": rows.bfloat16(),
            "w8": torch.randint(-128, 128, (6, 8), generator=random, dtype=torch.int8),
            "in_scale": torch.tensor([0.02]),
            "in_offset": torch.tensor([3.0]),
            "scale": torch.rand(6, generator=random),
            "deq_bits": torch.rand(6, generator=random).view(torch.int32).long(),
            "bias": torch.randint(-99, 99, (6,), generator=random, dtype=torch.int32),
        },
        directory / "model.safetensors",
    )
    return directory


def both(
    text: str, directory: Path, out: Path, given: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a program written out gives on a CPU, and in ONNX Runtime."""
    program = parse(text)
    checkpoint = open_checkpoint(directory)
    made = {n.name: make(n.meta["recipe"], checkpoint.read) for n in program.parameters()}
    return run(program, {**made, **given}), compiled(program, directory, out).run(given)


def keep(program: Program, made: dict[str, torch.Tensor], results: list[torch.Tensor]) -> None:
    made.update({c.name: r for c, r in zip(program.caches(), results[1:], strict=True)})


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in KINDS), ("llama", True)])
def test_prefill_and_decode_agree_with_the_program(kind, tied, emitted):
    model = emitted(kind, tied=tied)
    session = load(model.out, threads=1)
    made, text = values(model.program, model.directory), tokens(16)
    session.allocate(blocks=16, block_size=4)
    for start, end in ((0, 14), (14, 15), (15, 16)):
        given = step(text[start:end], [start], [end], TABLE)
        want, got = run(model.program, {**made, **given}), session.run(given)
        for a, b in zip(want, got, strict=True):
            assert (a - b).abs().max() <= BOUND * a.abs().max()
        keep(model.program, made, want)


@pytest.mark.parametrize("directory", QUANTIZED)
def test_the_int8_caches_of_a_quantized_model_are_equal_bit_for_bit(directory, emitted):
    """Codes differ only where a value lies within rounding of a tie: nowhere in this text."""
    program = emitted(directory).program
    session = load(emitted(directory).out, threads=1)
    made, text = values(program, directory), tokens(16)
    session.allocate(blocks=16, block_size=4)
    for start, end in ((0, 14), (14, 15), (15, 16)):
        given = step(text[start:end], [start], [end], TABLE)
        want, got = run(program, {**made, **given}), session.run(given)
        assert (want[0] - got[0]).abs().max() <= BOUND * want[0].abs().max()
        for a, b in zip(want[1:], got[1:], strict=True):
            assert a.dtype is torch.int8
            assert torch.equal(a, b)
        keep(program, made, want)


def test_a_mixed_batch_with_padding_and_then_other_sizes_in_the_same_session(emitted):
    directory = QUANTIZED[1]
    program = emitted(directory).program
    session = load(emitted(directory).out, threads=1)
    batches = [  # blocks of the cache, and new tokens, lengths and tables
        (16, [0, 8, 3], [6, 9, 3], [[14, 2, 0], [12, 1, 6], [3, 4, 5]]),  # the third has none new
        (9, [5], [6], [[3, 8]]),
        (32, [0, 2, 1, 7], [1, 4, 3, 8], [[0, 31], [1, 30], [2, 29], [3, 28]]),
    ]
    for blocks, starts, lengths, tables in batches:
        made = values(program, directory, blocks=blocks)
        random = torch.Generator().manual_seed(blocks)
        for cache in program.caches():
            shape = made[cache.name].shape
            filled = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
            made[cache.name] = filled
        given = step(tokens(sum(lengths) - sum(starts)), starts, lengths, tables)
        for name, padding in (("input_ids", 99), ("positions", 0), ("slot_mapping", -1)):
            more = torch.full((2,), padding, dtype=given[name].dtype)
            given[name] = torch.cat([given[name], more])
        given["logits_rows"] = torch.tensor([0, -3])
        want = run(program, {**made, **given})
        got = session.run({**made, **given})
        assert (want[0] - got[0]).abs().max() <= BOUND * want[0].abs().max()
        assert all(torch.equal(a, b) for a, b in zip(want[1:], got[1:], strict=True))


QUANTIZE_TEXT = """
def quantized(x: {dtype}[T, 2, 4], scale: f32[{shape}], zero: f32[{shape}]):
    quantize: i8[T, 2, 4] = kvc8.quantize(x, scale, {zero})
    return [quantize]
"""


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("shape", ["2, 4", "1", "2, 1"])
@pytest.mark.parametrize("zero", [None, 3.0, -128.0, 0.5])
def test_quantize_is_exact_at_ties_and_at_the_ends(dtype, shape, zero, stored, tmp_path):
    sizes = [int(d) for d in shape.split(",")]
    scale = 2.0 ** torch.arange(-3, -3 + len(torch.zeros(sizes).flatten())).reshape(sizes)
    halves = torch.arange(-600, 600) / 2  # every code, every tie and both ends
    x = halves[:, None, None] * scale.expand(1, 2, 4)
    random = torch.randn(4000, 2, 4, generator=torch.Generator().manual_seed(2)) * 9
    x = torch.cat(
        [x, random, torch.tensor([-0.0, float("inf"), float("-inf"), 6e4]).repeat(1, 2, 1)]
    )
    x = x.half() if dtype == "f16" else x
    text = QUANTIZE_TEXT.format(dtype=dtype, shape=shape, zero="zero" if zero else None)
    session = compiled(parse(text), stored, tmp_path / "out")
    for factor in (1.0, 0.7130217):  # exact ties, and quotients that are rounded
        given = {"x": x, "scale": scale * factor, "zero": torch.full(sizes, zero or 0.0)}
        want = ops.quantize(x, given["scale"], given["zero"] if zero else None)
        assert {-128, 127} <= set(want.flatten().tolist())
        assert torch.equal(session.run(given)[0], want)


def test_quantize_linear_would_be_wrong_at_ties_with_an_odd_zero_point():
    """Why zero points take Div, Add, Round, Clip: what ONNX's op would have computed instead."""
    x, scale, zero = torch.tensor([0.5, 1.5]), torch.ones(1), torch.tensor([3.0])
    onnx_says = x.round() + 3
    assert ops.quantize(x, scale, zero).tolist() == [4, 4]
    assert onnx_says.tolist() == [3, 5]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("shape", ["2, 4", "4", "1"])
@pytest.mark.parametrize("zero", [None, 3.0, 0.5])
def test_dequantize_is_exact(dtype, shape, zero, stored, tmp_path):
    q = torch.arange(-128, 128).to(torch.int8)[:, None, None].expand(256, 2, 4).contiguous()
    given_zero = "zero" if zero else None
    text = f"""
    def quantized(q: i8[T, 2, 4], scale: f32[{shape}], zero: f32[{shape}]):
        dequantize: {dtype}[T, 2, 4] = kvc8.dequantize(q, scale, {given_zero}, {dtype})
        return [dequantize]
    """
    sizes = [int(d) for d in shape.split(",")]
    scale = torch.rand(sizes, generator=torch.Generator().manual_seed(3))
    given = {"q": q, "scale": scale, "zero": torch.full(sizes, zero or 0.0)}
    [want], [got] = both(text, stored, tmp_path / "out", given)
    assert torch.equal(want, got)


@pytest.mark.parametrize("bias", ["added", None])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_quant_linear_is_exact_at_the_largest_sums(bias, dtype, stored, tmp_path):
    """Neighbors of 127 and -128 add up to more than int16 holds."""
    text = f"""
    def quantized(x: i8[1, T, 4096], w: i8[6, 4096], deq: f32[6], added: i32[6]):
        linear: {dtype}[1, T, 6] = kvc8.quant_linear(x, w, deq, {bias}, {dtype})
        return [linear]
    """
    random = torch.Generator().manual_seed(4)
    x = torch.randint(-128, 128, (1, 32, 4096), generator=random, dtype=torch.int8)
    x[0, 0], x[0, 1], x[0, 2] = 127, -128, -127
    w = torch.randint(-128, 128, (6, 4096), generator=random, dtype=torch.int8)
    w[0], w[1] = 127, -128
    deq = torch.rand(6, generator=random) * 1e-4
    added = torch.randint(-(2**20), 2**20, (6,), generator=random, dtype=torch.int32)
    given = {"x": x, "w": w, "deq": deq, "added": added}
    [want], [got] = both(text, stored, tmp_path / "out", given)
    assert torch.equal(want, got)


@pytest.mark.parametrize("slots", [[3, -1, 0, 23, -1], [-1] * 5, [23, 22, 21, 0, 7]])
@pytest.mark.parametrize(("name", "dtype"), [("i8", torch.int8), ("f16", torch.float16)])
def test_slot_minus_one_writes_nothing(slots, name, dtype, stored, tmp_path):
    text = f"""
    def captured(rows: {name}[T, 2, 4], slots: i32[T], cache: {name}[N, S, 2, 4] = cache()):
        new: {name}[N, S, 2, 4] = kvc8.cache_write(cache, rows, slots)
        return [rows, new]
    """
    rows, cache = (torch.arange(n * 8).reshape(-1, 2, 4) % 99 for n in (5, 24))
    given = {"rows": (rows + 100).to(dtype), "slots": torch.tensor(slots, dtype=torch.int32)}
    given["cache"] = cache.to(dtype).reshape(6, 4, 2, 4)
    (_, got) = compiled(parse(text), stored, tmp_path / "out").run(given)
    assert torch.equal(got, ops.cache_write(given["cache"], given["rows"], given["slots"]))


def test_a_session_keeps_its_caches_also_beside_outputs_that_are_watched(stored, tmp_path):
    text = """
    def captured(rows: f32[T, 2, 4], slots: i32[T], cache: f32[N, S, 2, 4] = cache()):
        neg: f32[T, 2, 4] = aten.neg(rows)
        new: f32[N, S, 2, 4] = kvc8.cache_write(cache, neg, slots)
        return [rows, neg, new]
    """
    session = compiled(parse(text), stored, tmp_path / "out")
    session.allocate(blocks=3, block_size=2)
    rows, want = torch.ones(1, 2, 4), torch.zeros(6, 2, 4)
    for slot in (4, 1, 5):
        given = {"rows": rows * slot, "slots": torch.tensor([slot], dtype=torch.int32)}
        same, seen, cache = session.run(given)
        want[slot] = -slot
        assert torch.equal(same, rows * slot)
        assert torch.equal(seen, -same)
        assert torch.equal(cache.flatten(0, 1), want)


ATTENTION_TEXT = """
def captured(
    q: {dtype}[T, 6, 8],
    k: {dtype}[N, S, 2, 8],
    v: {dtype}[N, S, 2, 16],
    table: i32[B, M],
    lens: i32[B],
    starts: i32[B + 1],
    sinks: {dtype}[6],
):
    out: {dtype}[T, 6, 16] = kvc8.paged_attention(q, k, v, table, lens, starts, {how})
    return [out]
"""
HOW = {
    "plain": "0.35, 0, 0.0, None",
    "window": "0.35, 3, 0.0, None",
    "softcap": "0.35, 0, 0.8, None",
    "sinks": "0.35, 0, 0.0, sinks",
    "all": "0.35, 4, 0.8, sinks",
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_paged_attention_reads_what_belongs_to_it_and_nothing_else(how, dtype, stored, tmp_path):
    """A prefill, an empty sequence, a decode step and a continued prefill, then padding.

    What no sequence owns is NaN, and the tables hold nonsense past each end. Sums are of 8 and of
    at most 13 terms of size 1, and logits of up to 8*9*0.35: at most 100 roundings.
    """
    kind = {"f32": torch.float32, "f16": torch.float16}[dtype]
    random = torch.Generator().manual_seed(5)
    nan = float("nan")
    k, v = (torch.full((16, 4, 2, d), nan, dtype=kind) for d in (8, 16))
    tables, lens = [[7, 2, -1, 999], [3, 999, -1, -1], [5, 0, 15, -7], [9, 8, 4, -1]], [5, 4, 12, 9]
    for table, end in zip(tables, lens, strict=True):
        for p in range(end):
            for cache in (k, v):
                at = torch.randn(cache.shape[2:], generator=random).clamp(-3, 3)
                cache[table[p // 4], p % 4] = at.to(kind)
    i32 = torch.int32
    given = {
        "q": torch.randn(14, 6, 8, generator=random).clamp(-3, 3).to(kind),
        "k": k,
        "v": v,
        "table": torch.tensor(tables, dtype=i32),
        "lens": torch.tensor(lens, dtype=i32),
        "starts": torch.tensor([0, 5, 5, 6, 12], dtype=i32),
        "sinks": torch.randn(6, generator=random).to(kind),
    }
    text = ATTENTION_TEXT.format(dtype=dtype, how=HOW[how])
    [want], [got] = both(text, stored, tmp_path / "out", given)
    assert torch.isfinite(want).all()
    rounding = 100 * UNIT if kind is torch.float32 else 2.0**-10
    assert (want.float() - got.float()).abs().max() <= rounding * 3
    assert (got[12:] == 0).all()


def test_only_the_pages_that_are_read_are_dequantized(emitted):
    out = emitted(QUANTIZED[0]).out
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    read = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(read) == 8  # K and V of four layers
    for node in read:
        flat = makers[node.input[0]]
        assert makers[makers[flat.input[0]].input[0]].op_type == "Gather"


@pytest.mark.parametrize("model", [*KINDS, *QUANTIZED])
def test_the_model_is_valid_and_of_standard_ops_and_names_its_sizes(model, emitted, tmp_path):
    shutil.copytree(emitted(model).out, tmp_path / "copy")  # the checker refuses hard links
    onnx.checker.check_model(tmp_path / "copy" / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "copy" / "model.onnx")
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    shapes = {
        port.name: [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        for port in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == ["T"]
    assert shapes["query_starts"] == ["B + 1"]
    assert shapes["block_table"] == ["B", "M"]
    assert shapes["logits"][0] == "R"
    assert shapes["k_cache_0_new"] == shapes["k_cache_0"]
    assert shapes["k_cache_0"][:2] == ["N", "S"]


def test_weights_are_linked_and_not_copied(emitted):
    model = emitted("llama")
    shard = model.out / "weights" / "model.safetensors"
    assert shard.samefile(model.directory / "model.safetensors")
    own = {p.name: p.stat().st_size for p in model.out.iterdir() if p.is_file()}
    assert own["derived.bin"] < 1024  # the rotary frequencies
    assert own["model.onnx"] < shard.stat().st_size / 5
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= own.keys()
    manifest = json.loads((model.out / "manifest.json").read_text())
    assert manifest["inputs"][0] == {"name": "input_ids", "dtype": "i64", "shape": ["T"]}
    assert [port["name"] for port in manifest["outputs"]][:2] == ["logits", "k_cache_0_new"]


RECIPES = [
    "f32[6, 8] = stored('rows')",
    "f32[6, 8] = cast(stored('half'), f32)",
    "f32[6, 8] = cast(stored('bf16'), f32)",
    "f32[8, 6] = transpose(stored('rows'), 0, 1)",
    "f32[6, 2, 4] = transpose(reshape(cast(stored('half'), f32), [6, 4, 2]), 1, 2)",
    "f32[2, 8] = slice(stored('rows'), 0, 3, 5)",
    "f32[12, 8] = concat([stored('rows'), neg(cast(stored('bf16'), f32))], 0)",
    "f32[6] = reciprocal(stored('scale'))",
    "f32[2, 6] = expand(float_bits(stored('deq_bits')), [2, 6])",
    "f32[3] = values([1.0, 2.5, -3.0], f32)",
    "f32[6, 8] = w8a8(stored('w8'), stored('in_scale'), stored('in_offset'), stored('scale'), "
    "stored('bias'))",
    "f32[6] = cast(w8a8_bias(stored('w8'), stored('in_scale'), stored('in_offset'), "
    "stored('scale'), stored('bias')), f32)",
]


@pytest.mark.parametrize("small", [0, weights.SMALL])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_exact_as_nodes_and_as_derived_tensors(
    recipe, small, stored, tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "SMALL", small)
    type_ = recipe.partition(" = ")[0]
    text = f"def captured(x: f32[1], w: {recipe}):\n    y: {type_} = aten.mul.Tensor(w, x)\n"
    [want], [got] = both(text + "    return [y]", stored, tmp_path / "out", {"x": torch.ones(1)})
    assert torch.equal(want, got)


def test_weights_beyond_two_gigabytes(tmp_path):
    """A shard of zeros that is a hole but for its last tensor."""
    directory, last = tmp_path / "model", torch.arange(8.0)
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    size = 5 << 29
    entries = {
        "big": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]},
        "last": {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]},
    }
    header = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size, 1)
        file.write(last.numpy().tobytes())
    text = """
    def captured(x: i64[8], big: i8[2684354560] = stored("big"), last: f32[8] = stored("last")):
        rows: i8[8] = aten.index.Tensor(big, [x])
        to: f32[8] = aten.to.dtype(rows, f32)
        out: f32[8] = aten.add.Tensor(to, last)
        return [out]
    """
    session = compiled(parse(text), directory, tmp_path / "out")
    [got] = session.run({"x": torch.arange(8) * (size // 8)})
    assert torch.equal(got, last)


def test_float16_programs_run(tmp_path, tiny_model):
    """ONNX Runtime leaves out roundings to float16 that torch makes: 2**-11 each, 12 sums deep."""
    directory = tiny_model("llama")
    program = capture(open_checkpoint(directory), dtype=torch.float16)
    session = compiled(program, directory, tmp_path / "out")
    made, text = values(program, directory), tokens(14)
    given = step(text, [0], [14], TABLE)
    want, got = run(program, {**made, **given})[0], session.run({**made, **given})[0]
    assert got.dtype is torch.float16
    assert (want.float() - got.float()).abs().max() <= 12 * 2.0**-11 * want.abs().max()


def refusal(program: Program, checkpoint: Checkpoint, out: Path) -> str:
    with pytest.raises(TargetError) as caught:
        emit(program, checkpoint, out)
    assert not out.exists()
    return str(caught.value)


def test_what_cannot_be_emitted_is_refused_in_one_sentence(stored, tmp_path):
    checkpoint, out = open_checkpoint(stored), tmp_path / "out"
    text = "def {}(x: f32[T]):\n    erf: f32[T] = aten.erf(x)\n    return [erf]"
    assert refusal(parse(text.format("captured")), checkpoint, out) == (
        "erf: onnx has no lowering for aten.erf; add one to backends/onnx/lowerings.py, or remove "
        "the call"
    )
    assert refusal(parse(text.format("lowered")), checkpoint, out) == (
        "lowered: ONNX is made from a captured or quantized program; emit before lowering for the "
        "NPU"
    )
    text = "def captured(x: f32[T], y: f32[T]):\n    add: f32[T] = aten.add.Tensor(x, y, alpha=2)\n"
    assert refusal(parse(text + "    return [add]"), checkpoint, out) == (
        "add: onnx has no alpha; multiply before the call"
    )


def test_what_cannot_be_run_is_refused_in_one_sentence(stored, tmp_path):
    text = (
        "def captured(x: {0}[T, 4]):\n    mul: {0}[T, 4] = aten.mul.Tensor(x, x)\n    return [mul]"
    )
    session = compiled(parse(text.format("f32")), stored, tmp_path / "out")
    with pytest.raises(TargetError, match=r"^x: has no value; give one, or allocate the caches$"):
        session.run({})
    with pytest.raises(TargetError) as caught:
        session.run({"x": torch.zeros(2, 5)})
    assert str(caught.value) == (
        "x: is torch.float32 [2, 5] and the model takes torch.float32 ['T', 4]; convert it"
    )
    with pytest.raises(TargetError, match=r"torch.float64 .* convert it$"):
        session.run({"x": torch.zeros(2, 4, dtype=torch.float64)})
    with pytest.raises(
        TargetError, match=r"cannot compute this on a CPU .*; compile it in float32"
    ):
        compiled(parse(text.format("bf16")), stored, tmp_path / "bf16")
    (tmp_path / "out" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"cannot be loaded \(.*\); compile it again$"):
        load(tmp_path / "out")


@pytest.mark.slow
def test_a_real_model_agrees_within_a_thousandth(smollm2, tmp_path, two_threads):
    checkpoint = open_checkpoint(smollm2)
    program = capture(checkpoint, dtype=torch.float32)
    session = compiled(program, smollm2, tmp_path / "out")
    assert (tmp_path / "out" / "derived.bin").stat().st_size < 1 << 20
    made = values(program, smollm2)
    session.allocate(blocks=16, block_size=4)
    text = torch.randint(3, 49000, (33,), generator=torch.Generator().manual_seed(6)).tolist()
    table = [list(range(15, -1, -1))]
    for start, end in ((0, 32), (32, 33)):
        given = step(text[start:end], [start], [end], table)
        want, got = run(program, {**made, **given}), session.run(given)
        assert (want[0] - got[0]).abs().max() < 1e-3
        keep(program, made, want)
