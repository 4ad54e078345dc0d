"""What was lowered for the NPU, as ONNX: each op a function that gives what its emulation gives."""

import onnx
import pytest
import torch
from support.onnx_models import (
    BOUND,
    QUANTIZED,
    UNIT,
    captured,
    quantized,
    tokens,
    with_int8_cache,
    without_weights,
)
from support.ties import on_one_of

from kvc8.backends.onnx.lowered import emit_lowered
from kvc8.backends.onnx.model import open_model
from kvc8.backends.onnx.runner import load
from kvc8.backends.runtime import model as runtime
from kvc8.backends.runtime.inputs import Rows, inputs
from kvc8.ir import npu
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.expression import make
from kvc8.ir.program import argument
from kvc8.ir.run import run
from kvc8.ir.text import parse
from kvc8.passes import pipeline
from kvc8.passes.options import Options

pytestmark = pytest.mark.slow  # a minute in all

TABLES = [[7, 2, 11, 5], [9, 1, 3, 8]]
BLOCK, BLOCKS, STEPS = 32, 12, 32
# A value of up to 127 steps is off by BOUND of it at most, and gets another code only within that
# of a middle, above or below: of values that lie anywhere, this share.
SHARE = 2 * 127 * BOUND


def lower(program, prefill_kv="int8", fuse="on"):
    return pipeline.lower_for_npu(program, Options(prefill_kv=prefill_kv, fuse=fuse))[0]


def agree(phases, directory, out, steps=STEPS):
    """Two prompts, each in two parts, and 32 decode steps: codes equal, logits within the bound.

    BOUND is of float32 sums taken in another order. Each step agrees with one of five tokens a
    sequence: see ties.py. A token's codes take the place of those of the one before. Prompts have
    too many codes for that: some of them are off by one, and steps start from the emulation's.
    """
    checkpoint = open_checkpoint(directory)
    emit_lowered(phases, checkpoint, out)
    ours = open_model(out, threads=1)
    ours.block_size = BLOCK
    ours.allocate(BLOCKS, [])
    emulated = runtime.load(
        phases,
        lambda expression: make(expression, checkpoint.read),
        blocks=BLOCKS,
        block_size=BLOCK,
    )

    def same(want, got):
        for name, cache in emulated.caches.items():
            assert cache.dtype is torch.int8
            assert torch.equal(cache, ours.caches[name]), name
        assert (want - got).abs().max() <= BOUND * want.abs().max()

    prompts = [tokens(9), tokens(14, seed=2)]
    first = [Rows(p[:5], 0, table) for p, table in zip(prompts, TABLES, strict=True)]
    rest = [Rows(p[5:], 5, table) for p, table in zip(prompts, TABLES, strict=True)]
    for batch in (first, rest):  # the prompts' beginnings, then chunks with a past
        want, got, new = emulated.mixed(batch), ours.mixed(batch), sum(len(r.tokens) for r in batch)
        assert want.shape == got.shape
        for name, cache in emulated.caches.items():
            gap = (cache.int() - ours.caches[name].int()).abs()
            assert gap.max() <= 1
            assert gap.sum() <= SHARE * new * cache.shape[2:].numel() + 1
            ours.caches[name].copy_(cache)
    for step in range(1, steps + 1):
        lengths = [9 + step, 14 + step]

        def take_step(chosen, lengths=lengths):
            same(*(model.decode(chosen, lengths, TABLES) for model in (emulated, ours)))

        on_one_of([tokens(2, seed=5 * step + i) for i in range(5)], take_step)


@pytest.mark.parametrize("directory", QUANTIZED, ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("prefill_kv", "fuse"), [("float", "on"), ("int8", "on"), ("int8", "off")])
def test_int8_linears_and_cache_agree_with_the_emulation(directory, prefill_kv, fuse, tmp_path):
    agree(lower(quantized(directory), prefill_kv, fuse), directory, tmp_path / "out")


@pytest.mark.parametrize("directory", QUANTIZED, ids=["symmetric", "zero points"])
def test_a_code_differs_only_where_the_value_does_that_it_is_made_of(directory, tmp_path):
    """Of every quantizer, those of linears too, in 32 decode steps that start from one cache.

    There is no form in double precision to compare in, as the other flavors have: the NPU's ops
    compute in float32 inside, whatever they are given, and their emulation and functions do so.
    """
    phases, checkpoint = lower(quantized(directory), fuse="off"), open_checkpoint(directory)
    quantizers = phases["decode"].calls(npu.npu_quantize)
    watched = list(dict.fromkeys(n for q in quantizers for n in (argument(q, 0), q)))
    emit_lowered({"decode": showing(phases["decode"], watched)}, checkpoint, tmp_path / "out")
    session = load(tmp_path / "out", 1, "decode")
    emulated = runtime.load(
        phases,
        lambda expression: make(expression, checkpoint.read),
        blocks=BLOCKS,
        block_size=BLOCK,
    )
    logits, compared = emulated.prefill([tokens(9)], TABLES[:1]), dict.fromkeys(quantizers, 0)
    for place in range(9, 9 + STEPS):
        rows = Rows([int(logits.argmax())], place, TABLES[0])
        given = inputs([rows], BLOCK, torch.device("cpu"), names=[p.name for p in session.inputs])
        given = {name: torch.as_tensor(x) for name, x in given.items()}
        _, *got = session.run({**given, **emulated.caches})
        values: dict[str, torch.Tensor] = {}
        logits = emulated.decode(
            rows.tokens,
            [place + 1],
            TABLES[:1],
            observe=lambda n, x, v=values: v.update({n.name: x}),
        )
        made = dict(zip([node.name for node in watched], got[: len(watched)], strict=True))
        for q in quantizers:
            same = values[argument(q, 0).name] == made[argument(q, 0).name]
            assert torch.equal(values[q.name][same], made[q.name][same])
            compared[q] += int(same.sum())
    assert min(compared.values()) > 99


def showing(program, nodes):
    """A program that gives some of its values too, between the logits and the caches."""
    probe = program.copy()
    here = {node.name: node for node in probe.graph.nodes}
    [output] = probe.graph.find_nodes(op="output")
    logits, *caches = output.args[0]
    output.args = ([logits, *(here[node.name] for node in nodes), *caches],)
    return probe


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_float_linears_agree_too(kind, tiny_model, tmp_path):
    directory = tiny_model(kind)
    phases = lower(with_int8_cache(captured(directory), zeros=True))
    agree(phases, directory, tmp_path / "out")


def test_attention_beside_sinks_agrees(tiny_model, tmp_path):
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    directory = tiny_model("granite_swa", num_hidden_layers=2, **windows)
    phases = lower(with_int8_cache(captured(directory), zeros=True))
    agree(phases, directory, tmp_path / "out", steps=8)


def test_prompts_end_to_end_agree_where_heads_are_wide(tiny_model, tmp_path):
    directory = tiny_model("llama", head_dim=128)
    phases = lower(with_int8_cache(captured(directory)))
    assert any(node.kwargs.get("input_layout") == "TND" for node in phases["prefill"].graph.nodes)
    agree(phases, directory, tmp_path / "out", steps=16)


def test_phases_share_what_is_made_of_stored_tensors(tmp_path):
    directory, sizes = QUANTIZED[1], []
    phases = lower(quantized(directory))
    for name, given in (("all", phases), ("one", {"decode": phases["decode"]})):
        emit_lowered(given, open_checkpoint(directory), tmp_path / name)
        sizes.append((tmp_path / name / "derived.bin").stat().st_size)
    assert sizes[1] <= sizes[0] < 2 * sizes[1]


def test_each_op_is_one_function_or_few_and_the_models_are_valid(tmp_path):
    phases = lower(quantized(QUANTIZED[1]))
    emit_lowered(phases, open_checkpoint(QUANTIZED[1]), tmp_path / "out")
    for phase, program in phases.items():
        model = without_weights(tmp_path / "out", phase)
        onnx.checker.check_model(model, full_check=True)
        called = {node.op_type for node in model.graph.node if node.domain == "npu"}
        assert called == {function.name for function in model.functions}
        ops = {n.target for n in program.graph.nodes if str(n.target).startswith("npu.")}
        names = {str(op).removeprefix("npu.").removesuffix(".default") for op in ops}
        assert names == {name for name in called if not name[-1].isdigit()}
        assert len(called) <= len(names) + 3


INPUTS = """
def lowered(
    x: {f}[T, 64], y: {f}[T, 64], k8: i8[T, 2, 16], w: i8[64, 32], x8: i8[T, 64],
    x32: i32[T, 64], gamma: {f}[64], beta: {f}[64],
    gamma_row: {f}[1, 64], beta_row: {f}[1, 64],
    wide: f32[64], whole: i32[64], packed: i64[32], deq: f32[32], bias: i32[32], slots: i32[T],
    heads: {f}[1, T, 4, 16], cos: {f}[1, T, 1, 16], sin: {f}[1, T, 1, 16], qkv: {f}[T, 128],
    cos2: {f}[T, 16], sin2: {f}[T, 16], per: f32[2, 16], off: f32[2, 16], row: f32[1, 64],
    half: f32[1, 32], unit: {f}[1], offset8: i8[1], shift: f32[1, 32],
    k_cache_0: i8[N, S, 2, 16] = cache(), v_cache_0: i8[N, S, 2, 16] = cache(),
):
    {line}
    return [{results}]
"""
EXACT = {
    "quantize": "a: i8[T, 64] = npu.npu_quantize(x, wide, whole, 1, -1, True)",
    "quantize by multiplying": "a: i8[T, 64] = npu.npu_quantize(x, gamma, None, 1, -1, False)",
    "anti quant": "a: {f}[T, 64] = npu.npu_anti_quant(x8, wide, offset=wide, dst_dtype={code})",
    "packed": "a: f16[T, 32] = npu.npu_quant_matmul(x8, w, packed, bias=bias, output_dtype=5)",
    "float scale": "a: f32[T, 32] = npu.npu_quant_matmul(x8, w, deq, output_dtype=6)",
}
CALLS = {
    "rotary": "a: {f}[1, T, 4, 16] = npu.npu_rotary_mul(heads, cos, sin)",
    "swiglu": "a: {f}[T, 32] = npu.npu_swiglu(x)",
    "geglu": "a: ({f}[T, 32], {f}[T, 32]) = npu.npu_geglu(x, -1, 1, True)",
    "geglu by erf, of the right": "a: ({f}[T, 32], {f}[T, 32]) = npu.npu_geglu(x, -1, 0)",
    "norm": "a: ({f}[T, 64], f32[T, 1]) = npu.npu_rms_norm(x, gamma, 1e-5)",
    "add and norm": "a: ({f}[T, 64], f32[T, 1], {f}[T, 64]) = npu.npu_add_rms_norm(x, y, gamma)",
    "norm, quantize": "a: i8[T, 64] = npu.npu_rms_norm_quant(x, gamma, beta, unit, offset8, 1e-5)",
    "norm of a row, quantize": "a: i8[T, 64] = "
    "npu.npu_rms_norm_quant(x, gamma_row, beta_row, unit, offset8, 1e-5)",
    "add, norm, quantize": "a: (i8[T, 64], i8[T, 64], {f}[T, 64]) = "
    "npu.npu_add_rms_norm_quant(x, y, gamma, wide, whole, scales2=wide)",
    "dequantize, swiglu, quantize": "a: (i8[T, 32], f32[T]) = npu.npu_dequant_swiglu_quant(x32, "
    "weight_scale=row, quant_scale=half, quant_offset=shift, activate_left=True)",
    "rotate, quantize, write": "a: ({f}[T, 4, 16], {f}[0], {f}[0], i8[N, S, 2, 16], "
    "i8[N, S, 2, 16]) = npu.npu_rope_quant_kvcache(qkv, cos2, sin2, k_cache_0, v_cache_0, slots, "
    "per, per, [64, 32, 32], offset_k=off, cache_mode='page')",
    "rotate, quantize, write, give": "a: ({f}[T, 4, 16], {f}[T, 2, 16], {f}[T, 2, 16], "
    "i8[N, S, 2, 16], i8[N, S, 2, 16]) = npu.npu_rope_quant_kvcache(qkv, cos2, sin2, k_cache_0, "
    "v_cache_0, slots, per, per, [64, 32, 32], kv_output=True, cache_mode='page')",
}
WRITE = (
    "a: () = npu.npu_scatter_pa_kv_cache(k8, k8, k_cache_0, v_cache_0, slots, cache_mode='Norm')"
)


def one(line, results, kind, out, stored):
    """What a program of one call gives emulated and in ONNX Runtime."""
    names = {torch.float32: ("f32", 6), torch.float16: ("f16", 5)}[kind]
    line = line.format(f=names[0], code=names[1])
    program = parse(INPUTS.format(f=names[0], line=line, results=results))
    emit_lowered({"decode": program}, open_checkpoint(stored), out)
    sizes, random = {"T": 24, "N": 3, "S": 16}, torch.Generator().manual_seed(0)
    given = {}
    for node in (*program.inputs(), *program.caches()):
        type_ = node.meta["type"]
        shape = [sizes.get(str(d), d) for d in type_.shape]
        if type_.dtype.is_floating_point:
            given[node.name] = (torch.rand(shape, generator=random) * 3 - 1).to(type_.dtype)
        else:
            given[node.name] = torch.randint(-99, 99, shape, generator=random, dtype=type_.dtype)
    for name in ("wide", "row", "half", "per", "deq", "gamma", "unit"):
        given[name] = given[name].abs() / 64 + 1 / 64
    given["x32"] = given["x32"] * 1000
    given["packed"] = given["deq"].view(torch.int32).long() | (1 << 46)
    given["slots"] = torch.randperm(48, generator=random)[:24].int()
    given["slots"][3] = -1
    want = run(program, {name: x.clone() for name, x in given.items()})
    return want, load(out, 1, "decode").run(given)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", EXACT)
def test_a_function_is_exact_where_its_op_rounds_in_one_way_only(name, kind, stored, tmp_path):
    want, got = one(EXACT[name], "a, k_cache_0, v_cache_0", kind, tmp_path / "out", stored)
    assert want[0].dtype is got[0].dtype
    assert torch.equal(want[0], got[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_a_function_rounds_at_most_where_its_op_might(name, kind, stored, tmp_path):
    """A result of n roundings differs by n units of its size, a code of such a value by one.

    No op here rounds more than 16 times, its sum of 64 squares aside, which adds 64 units of
    float32. Values are of size 4 at most before they are normalized.
    """
    items = {"norm": 2, "add and norm": 3, "add, norm, quantize": 3}
    items |= {
        "geglu": 2,
        "geglu by erf, of the right": 2,
        "norm, quantize": 1,
        "norm of a row, quantize": 1,
        "dequantize, swiglu, quantize": 2,
    }
    count = (items | {"rotary": 1, "swiglu": 1}).get(name, 5)
    line = CALLS[name]
    if count > 1:
        types = line[4 : line.index(") = ")].replace("], ", "]; ").split("; ")
        line += "".join(f"\n    a{i}: {t} = a[{i}]" for i, t in enumerate(types))
    wanted = ["a"] if count == 1 else [f"a{i}" for i in range(count)]
    results = ", ".join([*wanted, "k_cache_0", "v_cache_0"])
    unit = {torch.float32: 80 * UNIT, torch.float16: 16 * 2.0**-11}[kind]
    want, got = one(line, results, kind, tmp_path / "out", stored)
    for a, b in zip(want, got, strict=True):
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        if not a.numel():
            continue
        far = (a.double() - b.double()).abs().max()
        assert far <= (1 if a.dtype is torch.int8 else unit * max(4.0, float(a.abs().max())))


def test_a_write_in_place_is_seen_by_what_reads_the_cache_after_it(stored, tmp_path):
    line = WRITE + "\n    read: i8[N, S, 32] = aten.flatten.using_ints(k_cache_0, 2, 3)"
    results = "read, k_cache_0, v_cache_0"
    want, got = one(line, results, torch.float32, tmp_path / "out", stored)
    assert torch.equal(want[0], want[1].flatten(2))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "y: (i8[T, 4], f32[T]) = npu.npu_swiglu_quant(x)",
            "y: onnx has no lowering for npu.npu_swiglu_quant; add one to "
            "backends/onnx/npu_functions.py, or remove the call",
        ),
        (
            "y: f32[T, 4, 4] = npu.npu_swiglu(w, 1)",
            "y: npu_swiglu along another dimension than the last has no ONNX function; add it to "
            "backends/onnx/npu_functions.py",
        ),
        (
            "y: f32[T, 8] = npu.npu_rotary_mul(x, x, x, 'interleave')",
            "y: npu_rotary_mul with rotary_mode has no ONNX function; add it to "
            "backends/onnx/npu_functions.py",
        ),
        (
            "y: (f32[T, 8, 2], i32[T, 8, 2], i32[T, 8, 2]) = npu.npu_moe_gating_top_k_softmax(w, "
            "None, 2)  # model.layers.0.mlp",
            "model.layers.0.mlp: routes tokens to experts, which --flavor lowered cannot write as "
            "ONNX yet; use --flavor standard",
        ),
        (
            "y: (i8[T, 8], f32[T]) = npu.npu_dynamic_quant(x)  # model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.up_proj: quantizes by token (W8A8_DYNAMIC, or --kv-scales-by "
            "token), which --flavor lowered cannot write as ONNX yet; use --flavor standard",
        ),
    ],
)
def test_what_has_no_function_is_refused_with_the_reason(line, sentence, stored, tmp_path):
    text = f"def lowered(x: f32[T, 8], w: f32[T, 8, 4]):\n    {line}\n    return [x]"
    with pytest.raises(TargetError) as caught:
        emit_lowered({"decode": parse(text)}, open_checkpoint(stored), tmp_path / "out")
    assert str(caught.value) == sentence
    assert not (tmp_path / "out").exists()


def test_a_program_that_is_not_lowered_is_refused(stored, tmp_path):
    text = "def captured(x: f32[T, 8]):\n    y: f32[T, 8] = aten.neg(x)\n    return [y]"
    with pytest.raises(TargetError) as caught:
        emit_lowered({"decode": parse(text)}, open_checkpoint(stored), tmp_path / "out")
    assert str(caught.value) == (
        "decode: is a captured program; run the passes of the npu target, or choose another flavor"
    )
