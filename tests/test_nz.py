"""Caches in NZ format: the codes of ND at other places, in every phase, and what may use them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fake_npu import FakeNpu
from support.fused_models import in_doubles, lowered, quantized
from support.npu_calls import misfits, npu_calls
from support.onnx_models import DOUBLE_BOUND
from support.pass_docs import load as load_pass

from kvc8.backends.npu import artifact_reader, legality
from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu.cost import by_op, total
from kvc8.backends.npu.dumps import ValueDump, again, read_dump
from kvc8.backends.npu.explain import explain
from kvc8.backends.npu.graphs import Recorder
from kvc8.backends.npu.launches import launches
from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.backends.runtime.model import load
from kvc8.backends.workload import Device, Workload
from kvc8.ir import npu
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import IRError
from kvc8.ir.expression import make
from kvc8.ir.nz import from_nz, to_nz
from kvc8.ir.run import run
from kvc8.ir.text import parse
from kvc8.ir.verify import verify
from kvc8.passes import pipeline
from kvc8.passes.fuse_norm_rope_quant_cache import fuse_norm_rope_quant_cache
from kvc8.passes.fuse_rope_quant_cache import fuse_rope_quant_cache
from kvc8.passes.lower_caches_to_nz import lower_caches_to_nz
from kvc8.passes.options import Options
from kvc8.tools import command, compile
from kvc8.tools.verifier.contracts import RecordedCall, check
from kvc8.tools.verifier.recording import Parameters, empty, feed, record

# The smallest model whose heads the NPU's attention takes with NZ pages: 10 and 1 of 128.
SIZES = {
    "hidden_size": 20,
    "intermediate_size": 32,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_hidden_layers": 2,
}
KINDS = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}}
TOKENS = [(7 * i * i + 3 * i + 5) % 120 for i in range(45)]
TABLE = [5, 2, 7]
BLOCK = 32  # which the emulation takes, and a device only with ND pages


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    return lambda kind, **more: tiny_model(kind, tied=True, **{**SIZES, **KINDS[kind], **more})


def test_rows_written_to_nz_pages_lie_where_they_should():
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(-128, 128, (2, 50, 3, 64), generator=random).to(torch.int8)
    slots = torch.randperm(4 * 32, generator=random)[:50].int()
    nd = torch.zeros(2, 4, 32, 3, 64, dtype=torch.int8)
    nz = torch.zeros(2, 4, 6, 32, 32, dtype=torch.int8)
    npu.npu_scatter_pa_kv_cache(*rows, *nd, slots, cache_mode="Norm")
    npu.npu_scatter_pa_kv_cache(*rows, *nz, slots, cache_mode="PA_NZ")
    for a, b in zip(nd, nz, strict=True):
        assert a.any()
        assert torch.equal(to_nz(a), b)
        assert torch.equal(from_nz(b, 3), a)


CACHE = "def {}(c: {} = cache_nz({})):\n    return [c]"
WRONG = [
    (
        ("lowered", "i8[N, 7, S, 32]", 2),
        "c: 7 pieces of 32 are no 2 heads; write cache_nz(heads) with the number of heads",
    ),
    (
        ("lowered", "i8[N, S, 2, 32]", 2),
        "c: is i8[N, S, 2, 32] and an NZ cache is [N, pieces, S, 32]; make it so by nz_type",
    ),
    (
        ("lowered", "f16[N, 8, S, 32]", 2),
        "c: an NZ cache of torch.float16 in a lowered program; only int8 ones are, in a lowered "
        "program",
    ),
    (
        ("quantized", "i8[N, 8, S, 32]", 2),
        "c: an NZ cache of torch.int8 in a quantized program; only int8 ones are, in a lowered "
        "program",
    ),
]


@pytest.mark.parametrize(("cache", "says"), WRONG)
def test_a_cache_whose_type_does_not_fit_its_expression(cache, says):
    with pytest.raises(IRError) as error:
        verify(parse(CACHE.format(*cache)))
    assert str(error.value) == says


WRITE = """
    def lowered(
        k: {dtype}[T, 2, {dim}],
        slots: i32[T],
        k_cache_0: {dtype}[N, S, 2, {dim}] = cache(),
        v_cache_0: {dtype}[N, S, 2, {dim}] = cache(),
    ):
        write: () = npu.{write}(k, k, k_cache_0, v_cache_0, slots, cache_mode='Norm')
        more: {dtype}[N, S, 2, {dim}] = aten.{op}(v_cache_0)
        return [more, k_cache_0, v_cache_0]
"""
ALONE = [
    ({"dtype": "f16", "dim": 64, "op": "neg"}, "its cache is float"),
    ({"dtype": "i8", "dim": 48, "op": "neg"}, "its heads of 48 are no multiple of 32"),
    ({"dtype": "i8", "dim": 64, "op": "neg"}, "its cache is read by more"),
]


@pytest.mark.parametrize(("options", "why"), ALONE)
def test_a_cache_that_stays_as_it_is(options, why):
    with pytest.raises(IRError) as error:
        lower_caches_to_nz(parse(WRITE.format(write="npu_scatter_pa_kv_cache", **options)))
    assert str(error.value) == (
        f"lower_caches_to_nz: rewrote nothing (write left as it was: {why}); "
        "compile with --kv-format nd"
    )


# kind, W8A8, zero points in the cache
SAME = [
    *((kind, False, True) for kind in KINDS),
    *(("llama", True, False), ("qwen3", True, True), ("qwen2", False, False)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "w8a8", "zeros"), SAME)
def test_nz_is_nd_at_other_places(model, kind, w8a8, zeros):
    """The same passes but for the layout: the codes of ND and of QUANTIZED, and the logits.

    Attention over NZ pages takes no offset, so one of V goes into the codes of a W8A8 o_proj, which
    is exact to half a step of its quantizer (tests/test_folds.py); ND does that by `fold="kv"`, and
    QUANTIZED not at all.
    """
    directory = model(kind)
    fold = "kv" if w8a8 and zeros else "offsets"
    ends = fold == "kv"
    program = quantized(directory, torch.float32, w8a8=w8a8, zeros=zeros, ends=ends)
    logits, codes = in_doubles({"prefill": program, "decode": program}, directory)
    for fuse in ("off", "on"):
        of = {
            kv_format: lowered(program, fuse, prefill_kv="int8", kv_format=kv_format, fold=fold)
            for kv_format in ("nd", "nz")
        }
        nd, nz = (in_doubles(programs, directory) for programs in of.values())
        for a, b in zip(nd[0], nz[0], strict=True):
            assert (a - b).abs().max() <= DOUBLE_BOUND * a.abs().max()
        for name, cache in nd[1].items():
            assert cache.any()
            assert torch.equal(to_nz(cache), nz[1][name])
        if fold == "offsets":
            for name, cache in codes.items():
                assert torch.equal(from_nz(nz[1][name], 1), cache)
            for a, b in zip(nz[0], logits, strict=True):
                assert (a - b).abs().max() <= DOUBLE_BOUND * b.abs().max()


@pytest.mark.slow
def test_every_phase_reads_nz_pages_as_it_reads_nd_pages(model):
    """A prompt whole, in chunks and by tokens, in bfloat16: logits and codes are those of ND."""
    directory = model("llama")
    program = quantized(directory, torch.bfloat16, w8a8=False, zeros=True)
    read = open_checkpoint(directory).read
    found = {}
    for kv_format in ("nd", "nz"):
        programs = lowered(program, "off", prefill_kv="int8", kv_format=kv_format)
        for phase in programs.values():
            legality.check(phase, "ascend910b", 128)
        made = load(programs, lambda r: make(r, read), blocks=8, block_size=BLOCK)
        for ends in ((45,), (20, 38, 45), (3, *range(4, 46))):
            for start, end in zip((0, *ends[:-1]), ends, strict=True):
                logits = made.mixed([Rows(TOKENS[start:end], start, TABLE)])
            found[kv_format, ends] = logits, [cache.clone() for cache in made.caches.values()]
        sizes = [cache.shape for cache in made.caches.values()]
        assert sizes == [cache.shape(8, BLOCK) for cache in made.layout.caches]
    for (kv_format, ends), (logits, caches) in found.items():
        nd_logits, nd_caches = found["nd", ends]
        assert torch.equal(logits, nd_logits)
        for cache, nd in zip(caches, nd_caches, strict=True):
            assert torch.equal(from_nz(cache, 1) if kv_format == "nz" else cache, nd)


# Of a layer in decode, unfused and fused: kind, W8A8
LAUNCHES = [
    ("qwen3", True, 22, 10),
    ("qwen3", False, 18, 9),
    ("llama", True, 20, 15),  # the op that fuses its rope writes ND pages
    ("llama", False, 16, 14),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "w8a8", "unfused", "fused"), LAUNCHES)
def test_launches_of_a_layer_in_decode(model, kind, w8a8, unfused, fused):
    program = quantized(model(kind), torch.bfloat16, w8a8=w8a8, zeros=True)
    for fuse, count in (("off", unfused), ("on", fused)):
        for phase, made in lowered(program, fuse, kv_format="nz").items():
            legality.check(made, "ascend910b", 128)
            assert [misfits(node) for node in npu_calls(made) if misfits(node)] == []
            if phase == "decode":
                roles = {choice.role for choice in explain(made, "ascend910b", 128)}
                whole = "q and k norms, RoPE, quantization and cache write"
                assert (whole in roles) == (kind == "qwen3" and fuse == "on")
                assert [each.total() for each in launches(made).values()] == [count] * 2


BESIDE = "return [q_turned, k_cache_0, v_cache_0]"
SCATTER = "    write: () = npu.npu_scatter_pa_kv_cache(k_rows, v_rows, k_cache_0, v_cache_0, slots,"
LATE_SLOTS = "    late: i32[T] = aten.add.Tensor(slots, 1)\n    " + SCATTER.replace("slots", "late")
LEFT = [
    ("'PA_NZ'", "'Norm'", "its cache is in ND format, and the op writes NZ"),
    (BESIDE, BESIDE.replace("q_turned", "k8"), "what it quantizes is read beside the cache"),
    (
        BESIDE,
        BESIDE.replace("q_turned", "k_turned"),
        "its float rows are read beside the cache, and the op gives none",
    ),
    (
        BESIDE,
        BESIDE.replace("q_turned", "v"),
        "its float rows are read beside the cache, and the op gives none",
    ),
    ("mul(k_normed,", "mul(k_heads,", "its keys are not normalized before they are rotated"),
    (
        BESIDE,
        BESIDE.replace("q_turned", "k_normed"),
        "its normalized keys are read beside their rotation",
    ),
    (
        BESIDE,
        BESIDE.replace("q_turned", "k"),
        "its keys are read before they are normalized, or are not as wide as its values",
    ),
    (
        "(q_heads, qw, 1e-06)",
        "(q_heads, qw, 1e-05)",
        "its queries are not normalized and rotated as its keys are",
    ),
    (
        "(q_normed, c, s)",
        "(q_normed, s, c)",
        "its queries are not normalized and rotated as its keys are",
    ),
    ("= split[2]", "= split[1]", "its q, k and v are not made by one linear"),
    (SCATTER, LATE_SLOTS, "its slots are no input of the step"),
]


@pytest.mark.parametrize(("old", "new", "why"), LEFT)
def test_a_write_that_is_not_fused_says_why(old, new, why):
    _, found = load_pass("fuse_norm_rope_quant_cache")
    assert old in found[2]
    text = found[2].replace(old, new)
    if new == "'Norm'":
        text = text.replace("i8[N, 4, S, 32] = cache_nz(1)", "i8[N, S, 1, 128] = cache()")
    [remark] = fuse_norm_rope_quant_cache(parse(text))
    assert remark.why_not == why


def test_slots_that_are_computed_late_are_left_to_the_write():
    _, found = load_pass("fuse_rope_quant_cache")
    assert SCATTER in found[2]
    [remark] = fuse_rope_quant_cache(parse(found[2].replace(SCATTER, LATE_SLOTS)))
    assert remark.why_not == "its slots are no input of the step"


def test_what_an_op_is_to_write_is_read_by_nobody_before():
    _, found = load_pass("fuse_norm_rope_quant_cache")
    early = "        early: f16[T, 256] = aten.neg(new_empty)\n        to: "
    program = parse(found[4].replace("        to: ", early, 1))
    with pytest.raises(IRError) as error:
        verify(program)
    assert str(error.value) == (
        "npu_qkv_rms_norm_rope_cache: npu.npu_qkv_rms_norm_rope_cache.default writes to new_empty; "
        "use its functional form"
    )


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["chunk", "decode"])
def test_the_layout_and_the_fusion_keep_their_contracts(model, phase):
    directory = model("qwen3")
    program = quantized(directory, torch.float32, w8a8=False, zeros=True)
    parameters = Parameters(open_checkpoint(directory).read)
    tokens = [(5 + 37 * i) % 120 for i in range(16)]
    state = record(program, parameters, feed(tokens[:13]).inputs(program), empty(program)).caches
    given = feed(tokens[13:], 13) if phase == "chunk" else feed(tokens[13:14], 13)
    shared, own = pipeline.phases(Options(kv_format="nz"))[phase]
    at = own.index(lower_caches_to_nz)
    pipeline.run(program, (*shared, *own[:at]))
    verdicts = check(program, own[at : at + 3], [RecordedCall(given, state)], parameters)
    assert [verdict.sentence for verdict in verdicts] == ["", "", ""]
    assert all(verdict.sites for verdict in verdicts[:2])


@pytest.mark.slow
def test_a_step_costs_what_it_costs_with_nd(model):
    program = quantized(model("llama"), torch.bfloat16, w8a8=False, zeros=True)
    costs = {}
    for kv_format in ("nd", "nz"):
        programs = lowered(program, "off", kv_format=kv_format, fold="kv")
        for phase in ("chunk", "decode"):
            cost = total(by_op(programs[phase], phase, Workload(), Device()))
            costs[kv_format, phase] = cost
            assert cost.cache_read == 2 * 2 * 128 * Workload().context
    assert costs["nz", "decode"] == costs["nd", "decode"]
    assert costs["nz", "chunk"].launches == costs["nd", "chunk"].launches + 5  # where pieces lie


@pytest.mark.slow
def test_queries_that_an_op_writes_are_recorded_and_compared(model, tmp_path):
    """In a graph, and in a dump, where they are seen at their first reader."""
    directory = model("qwen3")
    read = open_checkpoint(directory).read
    program = quantized(directory, torch.bfloat16, w8a8=False, zeros=True)
    programs = lowered(program, "on", kv_format="nz")
    tokens = []
    for runner in (run, Recorder(FakeNpu(), 8), ValueDump(programs)):
        made = load(programs, lambda r: make(r, read), blocks=8, block_size=BLOCK)
        made.runner = runner
        [sequence] = generate(made, [TOKENS], most=4).sequences
        tokens.append(sequence.generated)
    assert tokens[0] == tokens[1] == tokens[2]
    runner.write(tmp_path / "dump")
    dump, parameters = read_dump(tmp_path / "dump"), made.parameters["decode"]
    assert not any(each.differ for each in again("decode", programs["decode"], dump, parameters))
    new_empty = torch.ops.aten.new_empty.default
    [queries] = programs["decode"].calls(new_empty)[0].users.keys() - programs["decode"].calls(
        npu.npu_qkv_rms_norm_rope_cache
    )
    dump[f"decode/{queries.name}"] += 1
    found = [each for each in again("decode", programs["decode"], dump, parameters) if each.differ]
    assert {each.origin for each in found} == {"model.layers.0.self_attn"}


def compile_(directory: Path, out: Path, *options: str) -> int:
    arguments = [str(directory), "--target", "npu", "-o", str(out), "--kv-format", "nz", *options]
    return command.entry(compile.parser(), compile.work, arguments)


@pytest.mark.slow
def test_a_model_is_compiled_with_nz_caches_and_generates_the_same(
    model, tmp_path, capsys, recwarn
):
    from support import c8

    c8.quantize_model(model("qwen3", num_hidden_layers=1), tmp_path / "float", "float")
    source = c8.with_offsets(tmp_path / "float", tmp_path / "model")
    options = ("--dtype", "bfloat16", "--block-size", "256")
    capsys.readouterr()
    assert compile_(source, tmp_path / "no", *options) == 1
    assert capsys.readouterr().err.endswith(
        "error: model.layers.0.self_attn: npu_fused_infer_attention_score on ascend910b takes "
        "block size 128 or 512 with cache format NZ, and this is 256 (op-plugin docs/zh/"
        "custom_APIs/torch_npu/npu_fused_infer_attention_score.md, NZ caches; ops-transformer "
        "incre_flash_attention_tiling_check.cpp:1868); compile with --block-size 128, or with "
        "--kv-format nd\n"
    )
    assert compile_(source, tmp_path / "nz", "--dtype", "bfloat16") == 0
    assert compile_(source, tmp_path / "nd", "--dtype", "bfloat16", "--kv-format", "nd") == 0
    tokens = []
    for name in ("nz", "nd"):
        found = artifact_reader.read(tmp_path / name)
        assert {cache.format for cache in found.layout.caches} == {name}
        assert found.notes["kv_format"] == name
        assert found.layout == kv_layout(found.programs["chunk"])
        made = load(found.programs, found.make, blocks=6, block_size=found.block_size)
        made = generate(made, [TOKENS, TOKENS[:7]], most=4, chunk=20)
        tokens.append([sequence.generated for sequence in made.sequences])
    assert tokens[0] == tokens[1]


def test_nz_is_of_npu_alone(tmp_path, capsys):
    arguments = [str(tmp_path), "--target", "onnx", "-o", "out", "--kv-format", "nz"]
    assert command.entry(compile.parser(), compile.work, arguments) == 1
    assert capsys.readouterr().err == (
        "error: --kv-format: nz is of --target npu; leave it out, or compile for npu\n"
    )


def test_nz_heads_is_of_nz_alone(tmp_path, capsys):
    arguments = [str(tmp_path), "--target", "npu", "-o", "out", "--nz-heads", "any"]
    assert command.entry(compile.parser(), compile.work, arguments) == 1
    assert capsys.readouterr().err == (
        "error: --nz-heads: any is of --kv-format nz; leave it out, or ask for nz\n"
    )
