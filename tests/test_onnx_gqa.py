"""The flavor gqa: GroupQueryAttention over a dense int8 cache gives what the program gives."""

import onnx
import pytest
import torch
from support.onnx_models import (
    BOUND,
    KINDS,
    QUANTIZED,
    captured,
    compiled,
    quantized,
    tokens,
    watching,
    with_int8_cache,
    without_weights,
)
from support.steps import step, values
from support.ties import on_one_of

from kvc8.backends.onnx.emitter import emit
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.run import run
from kvc8.ir.text import parse

pytestmark = pytest.mark.slow  # a minute in all

# Sequences of a batch: from which token to which, step by step. A prompt beside another, decoding
# beside a resting one (None), and a continued prompt beside decoding.
STEPS = [((0, 9), (0, 5)), ((9, 10), None), ((10, 11), (5, 12)), ((11, 12), (12, 13))]
TABLES = [[7, 2, 11, 5], [9, 1, 3, 8]]
ROOM = 24  # tokens a row of the dense cache holds


def dense(texts, ranges):
    """The inputs of a step of this flavor, and the rows of the flattened batch that are tokens."""
    counts = [0 if r is None else r[1] - r[0] for r in ranges]
    width = max(counts)
    ids, positions = (torch.zeros(len(ranges), width, dtype=torch.int64) for _ in range(2))
    for i, (text, r) in enumerate(zip(texts, ranges, strict=True)):
        if r is not None:
            ids[i, : counts[i]] = torch.tensor(text[r[0] : r[1]])
            positions[i, : counts[i]] = torch.arange(*r)
    rows = [i * width + j for i, count in enumerate(counts) for j in range(count)]
    lens = [5 if r is None else r[1] for r in ranges]  # the second rests after five tokens
    return {
        "input_ids": ids,
        "positions": positions,
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "query_lens": torch.tensor(counts, dtype=torch.int32),
        "logits_rows": torch.tensor(rows),
    }


def paged(texts, ranges):
    """The same step for the program."""
    there = [i for i, r in enumerate(ranges) if r is not None]
    new = [token for i in there for token in texts[i][slice(*ranges[i])]]
    starts, ends = ([ranges[i][side] for i in there] for side in (0, 1))
    return step(new, starts, ends, [TABLES[i] for i in there])


def written(program, caches, lens):
    """The codes of each sequence in the order of their tokens, [heads, tokens, head_dim] each."""
    return [
        cache[table].flatten(0, 1)[:length].transpose(0, 1)
        for cache in caches
        for table, length in zip(TABLES, lens, strict=True)
    ]


def agree(program, directory, out):
    """Codes equal and logits within the bound, in one of three pairs of texts: see ties.py."""
    session = compiled(program, directory, out, "gqa")
    texts = [[tokens(16, seed), tokens(16, seed + 1)] for seed in (1, 3, 5)]
    on_one_of(texts, lambda pair: agree_in(pair, program, directory, session))


def agree_in(texts, program, directory, session):
    session.allocate(blocks=2, block_size=ROOM)
    made = values(program, directory)
    lens = [0, 0]
    for ranges in STEPS:
        lens = [old if r is None else r[1] for old, r in zip(lens, ranges, strict=True)]
        want = run(program, {**made, **paged(texts, ranges)})
        got = session.run(dense(texts, ranges))
        assert (want[0] - got[0]).abs().max() <= BOUND * want[0].abs().max()
        made.update({c.name: x for c, x in zip(program.caches(), want[1:], strict=True)})
        codes = [row[:, :length] for x in got[1:] for row, length in zip(x, lens, strict=True)]
        for a, b in zip(written(program, want[1:], lens), codes, strict=True):
            if a.dtype is torch.int8:
                assert torch.equal(a, b)
            else:
                assert (a - b).abs().max() <= BOUND * a.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_decoding_agree_bit_for_bit_in_their_codes(kind, tiny_model, tmp_path):
    directory = tiny_model(kind)
    agree(with_int8_cache(captured(directory)), directory, tmp_path / "out")


def test_linears_of_int8_agree_too(tmp_path):
    agree(quantized(QUANTIZED[0]), QUANTIZED[0], tmp_path / "out")


def test_a_code_differs_only_where_its_row_does(tmp_path):
    """A prompt and 32 decode steps of int8 linears, in float32: the op knows no doubles.

    Where a row that goes into the cache is equal bit for bit, its codes must be, and while all
    codes were equal the logits must be.
    """
    program, directory = quantized(QUANTIZED[0]), QUANTIZED[0]
    probe, names = watching(program)
    session = compiled(probe, directory, tmp_path / "out", "gqa")
    session.allocate(blocks=1, block_size=48)
    made, text, agreed, equal = values(program, directory), tokens(41), True, 0
    for start, end in ((0, 9), *((n, n + 1) for n in range(9, 41))):
        given = step(text[start:end], [start], [end], [list(range(11, -1, -1))])
        want, got = run(probe, {**made, **given}), session.run(dense([text], [(start, end)]))
        for i in range(1, len(names) + 1):
            cache = want[i + len(names)].flatten(0, 1)
            codes = cache[given["slot_mapping"].long()], got[i + len(names)][0, :, start:end]
            same, alike = want[i] == got[i], codes[0] == codes[1].transpose(0, 1)
            assert alike[same].all()
            agreed, equal = agreed and bool(alike.all()), equal + int(same.sum())
        assert not agreed or (want[0] - got[0]).abs().max() <= BOUND * want[0].abs().max()
        made.update({c.name: x for c, x in zip(program.caches(), want[-len(names) :], strict=True)})
    assert equal > 41 * 64  # of the first layer's K and V at least


def test_a_cache_without_scales_stays_float(tiny_model, tmp_path):
    directory = tiny_model("mistral")
    agree(captured(directory), directory, tmp_path / "out")


def test_the_model_is_valid_and_names_its_sizes(tmp_path):
    compiled(quantized(QUANTIZED[0]), QUANTIZED[0], tmp_path / "out", "gqa")
    model = without_weights(tmp_path / "out")
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {
        port.name: [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        for port in (*model.graph.input, *model.graph.output)
    }
    assert list(shapes)[:5] == ["input_ids", "positions", "seq_lens", "query_lens", "logits_rows"]
    assert shapes["input_ids"] == ["B", "P"]
    assert shapes["query_lens"] == ["B"]
    assert shapes["k_cache_0"] == shapes["k_cache_0_new"] == ["B", 2, "L", 32]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("GroupQueryAttention") == 4
    assert {"ScatterND", "DequantizeLinear"}.isdisjoint(kinds)


TEXT = """
def quantized(
    q: f32[T, 4, 8],
    rows: f32[T, 2, 8],
    slot_mapping: i32[T],
    block_table: i32[B, M],
    seq_lens: i32[B],
    query_starts: i32[B + 1],
    scale: f32[2, 8],
    other: f32[2, 8],
    k_cache_0: i8[N, S, 2, 8] = cache(),
    v_cache_0: i8[N, S, 2, 8] = cache(),
):
    k8: i8[T, 2, 8] = kvc8.quantize(rows, scale, {zero})
    k_new_0: i8[N, S, 2, 8] = kvc8.cache_write(k_cache_0, k8, slot_mapping)
    v_new_0: i8[N, S, 2, 8] = kvc8.cache_write(v_cache_0, k8, slot_mapping)
    k: f32[N, S, 2, 8] = kvc8.dequantize(k_new_0, {back}, {zero}, f32)
    v: f32[N, S, 2, 8] = kvc8.dequantize(v_new_0, scale, None, f32)
    out: f32[T, 4, 8] = kvc8.paged_attention(q, {k}, {v}, {pages}, 0.3, 0, 0.0, None)
    return [out, k_new_0, v_new_0]
"""
PAGES = "block_table, seq_lens, query_starts"
GOOD = {"zero": None, "back": "scale", "k": "k", "v": "v", "pages": PAGES}


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (
            {"zero": "other"},
            "k_new_0: has zero points, and the int8 cache of GroupQueryAttention has none; "
            "compile with --flavor standard",
        ),
        (
            {"back": "other"},
            "k_new_0: is written with another scale than it is read with; "
            "compile with --flavor standard",
        ),
        (
            {"v": "k"},
            "v_new_0: is not read by one attention, which is what GroupQueryAttention does; "
            "compile with --flavor standard",
        ),
    ],
)
def test_what_the_op_cannot_do_is_refused_with_the_reason(bad, sentence, stored, tmp_path):
    with pytest.raises(TargetError) as caught:
        emit(
            parse(TEXT.format(**{**GOOD, **bad})), open_checkpoint(stored), tmp_path / "out", "gqa"
        )
    assert str(caught.value) == sentence
    assert not (tmp_path / "out").exists()
