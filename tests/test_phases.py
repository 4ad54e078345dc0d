"""One prompt through every phase: whole, in chunks, from shared blocks, token by token, mixed.

With `--prefill-kv int8` a row sees the same codes in every phase. What it makes of them differs by
the order of sums, so two promises can be held: a code whose float input is equal bit for bit is
equal, and the greedy tokens are.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import c8
from support.ties import on_one_of

from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.inputs import CPU, Rows, batch_of
from kvc8.backends.runtime.model import load
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.nz import from_nz
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.verifier.forms import Run
from kvc8.tools.verifier.forms import watch as watch_rows

BLOCK = 32
PROMPT = [(7 * i * i + 3 * i + 5) % 120 for i in range(75)]  # over two blocks, and into a third
TABLE = [5, 2, 7, 1]
STEPS = 6
# Heads that the NPU's attention takes with NZ pages.
NZ = {
    "hidden_size": 40,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_hidden_layers": 2,
}


def split(sizes: list[int]) -> list[Rows]:
    """The prompt in parts of those sizes; a last one takes the rest."""
    parts, start = [], 0
    for size in [*sizes, len(PROMPT)]:
        tokens = PROMPT[start : start + size]
        parts += [Rows(tokens, start, TABLE)] if tokens else []
        start += len(tokens)
    return parts


WAYS = {
    "chunks": split([30, 20]),
    "short chunks": split([7] * 20),
    "a chunk of one": split([40, 1]),
    "token by token": split([1] * 80),
}


class Model:
    """The lowered programs of a checkpoint, unfused, so that what is quantized can be seen."""

    def __init__(self, directory, fold="offsets", prefill_kv="int8", fuse="off", kv_format="nd"):
        self.checkpoint = open_checkpoint(directory)
        program = capture(self.checkpoint, torch.float32)
        pipeline.run(program, pipeline.QUANTIZE)
        self.reference = {phase: program for phase in ("prefill", "chunk", "decode")}
        self.lowered, _ = pipeline.lower_for_npu(
            program, Options(prefill_kv=prefill_kv, fold=fold, fuse=fuse, kv_format=kv_format)
        )

    def load(self, programs=None):
        read = self.checkpoint.read
        chosen = programs or self.lowered
        return load(chosen, lambda r: make(r, read), blocks=12, block_size=BLOCK)

    def run(self, parts: list[Rows], programs=None) -> tuple[list[int], Run]:
        """The greedy tokens after the prompt, and what went into the cache."""
        model, seen, tokens = self.load(programs), Run(), []
        for rows in parts:
            logits = model.mixed([rows], observe=watch_rows(seen))
        for length in range(len(PROMPT) + 1, len(PROMPT) + STEPS + 1):
            tokens.append(int(logits[0].argmax()))
            rows = Rows(tokens[-1:], length - 1, TABLE)
            logits = model.mixed([rows], observe=watch_rows(seen))
        seen.caches = {
            cache.name: from_nz(model.caches[cache.name], cache.heads)
            if cache.format == "nz"
            else model.caches[cache.name]
            for cache in model.layout.caches
        }
        return [*tokens, int(logits[0].argmax())], seen


def written(cache: torch.Tensor) -> torch.Tensor:
    """The codes in the order of the tokens, [tokens, H*D]."""
    slots = [TABLE[p // BLOCK] * BLOCK + p % BLOCK for p in range(len(PROMPT) + STEPS)]
    return cache.flatten(0, 1)[slots].flatten(1)


def check_codes(a: Run, b: Run) -> int:
    """Codes of equal inputs are equal, and those of the first layer's V; gives how many differ."""
    differ = 0
    assert list(a.rows) == list(b.rows) == list(a.caches)
    for name in a.caches:
        codes, others = written(a.caches[name]), written(b.caches[name])
        rows, more = (torch.cat(run.rows[name]) for run in (a, b))
        assert rows.shape == codes.shape
        wrong = codes != others
        assert not (wrong & (rows == more)).any(), name
        assert (codes.int() - others.int()).abs().max() <= 1, name
        differ += int(wrong.sum())
    return differ


MODELS = [
    ("llama", "float", "offsets", "kv"),
    ("qwen2", "float", "symmetric", "offsets"),
    ("qwen3", "float", "offsets", "offsets"),
    ("mistral", "float", "offsets", "kv"),  # a window in every layer
    ("gemma3", "float", "symmetric", "offsets"),  # and in every second one
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "linears", "variant", "fold"), MODELS)
def test_all_phases_agree_where_a_prompt_sees_its_codes(kind, linears, variant, fold, tiny_c8):
    model = Model(tiny_c8(kind, linears, variant), fold)
    whole, seen = model.run(split([]))
    of = sum(written(cache).numel() for cache in seen.caches.values())
    for way, parts in WAYS.items():
        tokens, other = model.run(parts)
        assert tokens == whole, way
        assert check_codes(seen, other) <= of / 1000, way  # on the middle between two, by rounding
    tokens, other = model.run(split([]), model.reference)
    assert tokens == whole
    assert check_codes(seen, other) <= of / 1000


# Float linears: where W8A8 ones quantize too, a code that moves by rounding moves others.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kv_format"), [("llama", "nd"), ("qwen3", "nz")])
def test_all_phases_of_fused_programs_agree(kind, kv_format, tiny_c8, tiny_model, tmp_path):
    """What a fused op quantizes nobody sees, so codes are compared, and the greedy tokens."""
    directory = tiny_c8(kind, "float", "offsets") if kv_format == "nd" else tmp_path / "offsets"
    if kv_format == "nz":
        c8.quantize_model(tiny_model(kind, **NZ), tmp_path / "symmetric", "float")
        c8.with_offsets(tmp_path / "symmetric", directory)
    model = Model(directory, fuse="on", kv_format=kv_format)
    whole, seen = model.run(split([]))
    of = sum(written(cache).numel() for cache in seen.caches.values())
    for parts, programs in ((WAYS["chunks"], None), (split([]), model.reference)):
        tokens, other = model.run(parts, programs)
        assert tokens == whole
        gaps = [
            (written(cache).int() - written(other.caches[name]).int()).abs()
            for name, cache in seen.caches.items()
        ]
        assert max(int(gap.max()) for gap in gaps) <= 1
        assert sum(int(gap.sum()) for gap in gaps) <= of / 1000


@pytest.mark.slow
def test_a_mixed_batch_gives_what_each_sequence_gets_alone(tiny_c8):
    model = Model(tiny_c8("llama", "float", "offsets"))

    def agree(prompt: list[int]) -> None:
        alone, together = model.load(), model.load()
        alone.mixed([Rows(prompt[:40], 0, [0, 1])])
        alone.mixed([Rows(prompt[:9], 0, [2])])
        together.mixed([Rows(prompt[:9], 0, [2]), Rows(prompt[:40], 0, [0, 1])])
        batch = [
            Rows(prompt[9:10], 9, [2]),  # decode
            Rows(prompt[:21], 0, [3]),  # a fresh prompt
            Rows(prompt[40:60], 40, [0, 1]),  # the next chunk of one
        ]
        want = torch.cat([alone.mixed([rows]) for rows in batch])
        got = together.mixed(batch)
        # the same rows in the same programs, so only how many share a product of matrices differs
        assert torch.allclose(got, want, atol=1e-4)
        for name, cache in alone.caches.items():
            assert torch.equal(cache, together.caches[name])

    on_one_of((PROMPT, PROMPT[::-1], PROMPT[1:] + PROMPT[:1]), agree)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 128])  # one sequence a call, and end to end
def test_chunks_and_shared_blocks_generate_the_same(head_dim, tiny_c8, tiny_model, tmp_path):
    c8.quantize_model(tiny_model("llama", head_dim=head_dim), tmp_path / "model", "float")
    model = Model(tmp_path / "model")
    prompts = [PROMPT, [*PROMPT[:70], 3, 4], [1, 2, 3], [*PROMPT[:64], 9]]
    plain = generate(model.load(), prompts, most=5)
    chunked = generate(model.load(), prompts, most=5, chunk=16)
    shared = generate(model.load(), prompts, most=5, chunk=24, share=True)
    wanted = [sequence.generated for sequence in plain.sequences]
    for other in (chunked, shared):
        assert [sequence.generated for sequence in other.sequences] == wanted
    total = sum(map(len, prompts))
    assert plain.statistics.prefill_tokens == chunked.statistics.prefill_tokens == total
    assert shared.statistics.found_tokens == 64 + 64  # two whole blocks, twice
    assert shared.statistics.prefill_tokens == total - 128
    assert shared.statistics.cache_bytes_used < plain.statistics.cache_bytes_used


@given(length=st.integers(1, 300), window=st.integers(1, 90), block=st.integers(1, 40))
def test_a_window_shows_its_tokens_and_no_others(length, window, block):
    blocks = -(-length // block)
    table = [(7 * i + 3) % (blocks + 9) * 2 for i in range(blocks)]
    rows = [Rows([0], length - 1, table), Rows([0], 0, [1])]
    batch = batch_of(rows, block, CPU)
    tables, lens = batch.window_table(window).tolist(), batch.window_lens(window)
    hidden = batch.window_hidden(window)
    assert hidden.shape == (2, 1, 1, len(tables[0]) * block)
    seen = [
        tables[0][j // block] * block + j % block for j in range(lens[0]) if not hidden[0, 0, 0, j]
    ]
    want = range(max(0, length - window), length)
    assert seen == [table[p // block] * block + p % block for p in want]
    assert (tables[1][0], lens[1], bool(hidden[1, 0, 0, 0])) == (1, 1, False)
    assert len({len(row) for row in tables}) == 1
    assert max(lens) <= len(tables[0]) * block
