"""An ONNX model gives in ONNX Runtime what its program gives, and its int8 codes bit for bit."""

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from support.onnx_models import (
    BOUND,
    DOUBLE_BOUND,
    KINDS,
    QUANTIZED,
    TABLE,
    both,
    captured,
    compiled,
    keep,
    quantized,
    tokens,
    with_int8_cache,
)
from support.steps import step, values
from support.ties import on_one_of

from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.runner import load
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program
from kvc8.ir.run import run
from kvc8.ir.text import parse

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


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
    """In float32, as it is emitted, in one of three texts; in doubles below, in each."""
    program = emitted(directory).program
    session = load(emitted(directory).out, threads=1)

    def agree(text):
        made = values(program, directory)
        session.allocate(blocks=16, block_size=4)
        for start, end in ((0, 14), (14, 15), (15, 16)):
            given = step(text[start:end], [start], [end], TABLE)
            want, got = run(program, {**made, **given}), session.run(given)
            assert (want[0] - got[0]).abs().max() <= BOUND * want[0].abs().max()
            for a, b in zip(want[1:], got[1:], strict=True):
                assert a.dtype is torch.int8
                assert torch.equal(a, b)
            keep(program, made, want)

    on_one_of([tokens(16, seed) for seed in (1, 2, 3)], agree)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_double_precision_every_kind_of_model_keeps_its_codes(kind, zeros, tiny_model, tmp_path):
    directory = tiny_model(kind)
    agree_in_double(with_int8_cache(captured(directory), zeros), directory, tmp_path / "out")


@pytest.mark.parametrize("directory", QUANTIZED, ids=["symmetric", "zero points"])
def test_in_double_precision_so_do_int8_linears(directory, tmp_path):
    agree_in_double(quantized(directory), directory, tmp_path / "out")


def agree_in_double(program, directory, out):
    """Two prompts together and 32 decode steps of both: every code equal, logits within the bound.

    See ir/precision/widen.py for why no code may differ there.
    """
    wide = widen(program)
    session = compiled(wide, directory, out)
    made, texts = values(wide, directory, blocks=24), [tokens(41), tokens(46, seed=2)]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    session.allocate(blocks=24, block_size=4)
    starts = [0, 0]
    for lengths in [[9, 14], *([9 + i, 14 + i] for i in range(1, 33))]:
        new = [t for text, a, b in zip(texts, starts, lengths, strict=True) for t in text[a:b]]
        given = step(new, starts, lengths, [order[:12], order[12:]])
        want, got = run(wide, {**made, **given}), session.run(given)
        assert want[0].dtype is torch.float64
        assert (want[0] - got[0]).abs().max() <= DOUBLE_BOUND * want[0].abs().max()
        assert all(torch.equal(a, b) for a, b in zip(want[1:], got[1:], strict=True))
        keep(wide, made, want)
        starts = lengths


def test_gelu_of_doubles_has_constants_of_doubles(stored, tmp_path):
    """Results of size 8 at most, rounded 10 times on the way."""
    text = """
    def captured(x: f64[64]):
        gelu: f64[64] = aten.gelu(x, approximate='tanh')
        return [gelu]
    """
    x = torch.linspace(-8, 8, 64, dtype=torch.float64)
    [want], [got] = both(text, stored, tmp_path / "out", {"x": x})
    assert (want - got).abs().max() <= 8 * 10 * 2.0**-53


class Uncached(torch.nn.Module):
    """A model of transformers without a cache, its mask and positions spelled out."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        at = torch.arange(ids.shape[1])
        mask = torch.where(at[None] > at[:, None], float("-inf"), 0.0)[None, None]
        given = {"attention_mask": mask, "position_ids": at[None], "use_cache": False}
        return self.model(ids, **given).logits


# What torch's exporter and the libraries below it say of themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchs_own_exporter_gives_the_same_model(emitted, tmp_path):
    """An independent way from transformers to ONNX, which knows nothing of kvc8."""
    model = emitted("qwen3")
    torch.onnx.export(
        Uncached(model.directory).eval(),
        (torch.arange(3, 12)[None],),
        tmp_path / "theirs.onnx",
        dynamo=True,
        verbose=False,
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes=({1: torch.export.Dim("T", max=512)},),
        opset_version=23,
    )
    text = tokens(16)
    theirs = ort.InferenceSession(tmp_path / "theirs.onnx", providers=["CPUExecutionProvider"])
    want = torch.from_numpy(theirs.run(None, {"ids": torch.tensor([text]).numpy()})[0])[0]
    session = load(model.out, threads=1)
    session.allocate(blocks=16, block_size=4)
    got = session.run(step(text, [0], [16], TABLE))[0]
    assert (want - got).abs().max() <= BOUND * want.abs().max()


def test_a_mixed_batch_with_padding_and_then_other_sizes_in_the_same_session(emitted, tmp_path):
    directory = QUANTIZED[1]
    program = widen(emitted(directory).program)
    session = compiled(program, directory, tmp_path / "out")
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
        assert (want[0] - got[0]).abs().max() <= DOUBLE_BOUND * want[0].abs().max()
        assert all(torch.equal(a, b) for a, b in zip(want[1:], got[1:], strict=True))


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


def test_a_cache_that_is_read_before_it_is_written_is_refused(stored, tmp_path):
    text = """
    def captured(rows: f32[T, 2, 4], slots: i32[T], cache: f32[N, S, 2, 4] = cache()):
        new: f32[N, S, 2, 4] = kvc8.cache_write(cache, rows, slots)
        old: f32[N, S, 2, 4] = aten.neg(cache)
        return [old, new]
    """
    assert refusal(parse(text), open_checkpoint(stored), tmp_path / "out") == (
        "cache: is read as it was before a call writes to it; read what the write gives"
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
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 5e6
    made = values(program, smollm2)
    session.allocate(blocks=16, block_size=4)
    text = torch.randint(3, 49000, (33,), generator=torch.Generator().manual_seed(6)).tolist()
    table = [list(range(15, -1, -1))]
    for start, end in ((0, 32), (32, 33)):
        given = step(text[start:end], [start], [end], table)
        want, got = run(program, {**made, **given}), session.run(given)
        assert (want[0] - got[0]).abs().max() < 1e-3
        keep(program, made, want)
