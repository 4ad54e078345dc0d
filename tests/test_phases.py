"""One prompt through every phase: whole, in chunks, from shared blocks, token by token, mixed.

With `--prefill-kv int8` a row sees the same codes in every phase. What it makes of them differs by
the order of sums, so two promises are held: in doubles all codes and greedy tokens are equal, and
in float32 each code whose float input is equal bit for bit.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import c8
from support.doubles import in_doubles
from support.onnx_models import DOUBLE_BOUND

from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.inputs import CPU, Rows, batch_of
from kvc8.backends.runtime.kv_layout import Cache
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


WAYS = {"chunks": split([30, 1, 9]), "token by token": split([1] * 80)}


@dataclass
class Made:
    """What a model gave for the prompt and the steps after it."""

    tokens: list[int]
    codes: dict[str, torch.Tensor]  # by cache, in the order of the tokens


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
        made = load(chosen, lambda r: make(r, read), blocks=12, block_size=BLOCK)
        return in_doubles(made, read)

    def run(self, parts: list[Rows], programs=None) -> tuple[Made, Run]:
        """What the model gave in doubles, and what went into the cache in float32."""
        model, seen, tokens = self.load(programs), Run(), []
        for rows in parts:
            logits = model.mixed([rows], observe=watch_rows(seen))
        for length in range(len(PROMPT) + 1, len(PROMPT) + STEPS + 1):
            tokens.append(int(logits[0].argmax()))
            rows = Rows(tokens[-1:], length - 1, TABLE)
            logits = model.mixed([rows], observe=watch_rows(seen))
        tokens.append(int(logits[0].argmax()))
        codes = {
            cache.name: written(model.codes(cache.name), cache) for cache in model.layout.caches
        }
        seen.caches = {
            cache.name: written(model.caches[cache.name], cache) for cache in model.layout.caches
        }
        return Made(tokens, codes), seen


def written(pages: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The codes in the order of the tokens, [tokens, H*D]."""
    slots = [TABLE[p // BLOCK] * BLOCK + p % BLOCK for p in range(len(PROMPT) + STEPS)]
    plain = from_nz(pages, cache.heads) if cache.format == "nz" else pages
    return plain.flatten(0, 1)[slots].flatten(1)


def assert_same(a: Made, b: Made) -> None:
    assert a.tokens == b.tokens
    assert list(a.codes) == list(b.codes)
    assert all(torch.equal(a.codes[name], b.codes[name]) for name in a.codes)


def assert_same_of_equal_inputs(a: Run, b: Run) -> None:
    assert list(a.rows) == list(b.rows) == list(a.caches)
    for name in a.caches:
        rows, more = (torch.cat(run.rows[name]) for run in (a, b))
        assert rows.shape == a.caches[name].shape
        assert not ((a.caches[name] != b.caches[name]) & (rows == more)).any(), name


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
    for parts, programs in (
        *((parts, None) for parts in WAYS.values()),
        (split([]), model.reference),
    ):
        other, seen_there = model.run(parts, programs)
        assert_same(whole, other)
        assert_same_of_equal_inputs(seen, seen_there)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kv_format"), [("llama", "nd"), ("qwen3", "nz")])
def test_all_phases_of_fused_programs_agree(kind, kv_format, tiny_c8, tiny_model, tmp_path):
    """What a fused op quantizes nobody sees, so only what they give in doubles is compared."""
    directory = tiny_c8(kind, "float", "offsets") if kv_format == "nd" else tmp_path / "offsets"
    if kv_format == "nz":
        c8.quantize_model(tiny_model(kind, **NZ), tmp_path / "symmetric", "float")
        c8.with_offsets(tmp_path / "symmetric", directory)
    model = Model(directory, fuse="on", kv_format=kv_format)
    whole, _ = model.run(split([]))
    for parts, programs in ((WAYS["chunks"], None), (split([]), model.reference)):
        assert_same(whole, model.run(parts, programs)[0])


@pytest.mark.slow
def test_a_mixed_batch_gives_what_each_sequence_gets_alone(tiny_c8):
    model = Model(tiny_c8("llama", "float", "offsets"))
    alone, together = model.load(), model.load()
    alone.mixed([Rows(PROMPT[:40], 0, [0, 1])])
    alone.mixed([Rows(PROMPT[:9], 0, [2])])
    together.mixed([Rows(PROMPT[:9], 0, [2]), Rows(PROMPT[:40], 0, [0, 1])])
    batch = [
        Rows(PROMPT[9:10], 9, [2]),  # decode
        Rows(PROMPT[:21], 0, [3]),  # a fresh prompt
        Rows(PROMPT[40:60], 40, [0, 1]),  # the next chunk of one
    ]
    want = torch.cat([alone.mixed([rows]) for rows in batch])
    got = together.mixed(batch)
    assert (got - want).abs().max() <= DOUBLE_BOUND * want.abs().max()
    for name in alone.caches:
        assert torch.equal(alone.codes(name), together.codes(name))


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
