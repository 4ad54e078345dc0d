"""Sequences of a batch get what they would get alone, and blocks are used by one at a time."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc8.backends.npu.artifact import CompiledFor, write
from kvc8.backends.npu.artifact_reader import Artifact, read
from kvc8.backends.runtime.blocks import Blocks
from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.inputs import Rows, inputs
from kvc8.backends.runtime.model import Model, load
from kvc8.backends.runtime.sampling import Sampling, choose
from kvc8.backends.runtime.scheduler import Scheduler
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.expression import make
from kvc8.ir.text import parse
from kvc8.passes import pipeline

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
BLOCK = 32
PROMPTS = [[5, 6, 7], [9, 8] * 20, [100, 200, 300, 400, 5], [77] * 32, [11]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    checkpoint = open_checkpoint(GOLDEN)
    program = capture(checkpoint)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    out = tmp_path_factory.mktemp("artifact") / "out"
    write(out, checkpoint, lowered, CompiledFor("ascend910b", BLOCK))
    return read(out)


def loaded(artifact: Artifact, blocks: int = 16) -> Model:
    return load(artifact.programs, artifact.make, blocks=blocks, block_size=BLOCK)


@settings(max_examples=200)
@given(
    count=st.integers(1, 12),
    block_size=st.integers(1, 5),
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=8),
    data=st.data(),
)
def test_a_block_has_one_owner_and_all_come_back(count, block_size, prompts, data) -> None:
    scheduler = Scheduler(Blocks(count, block_size), stops=frozenset([0]))
    added = []
    for length, limit in prompts:
        if -(-(length + limit - 1) // block_size) <= count:
            added.append(scheduler.add([1] * length, limit))
    admitted = []
    for _ in range(sum(limit for _, limit in prompts) + 1):
        admitted += scheduler.admit()
        owned = [block for sequence in scheduler.running for block in sequence.blocks]
        assert len(set(owned)) == len(owned) == scheduler.blocks.used
        assert set(owned) <= set(range(count))
        assert scheduler.blocks.free + scheduler.blocks.used == count
        for sequence in list(scheduler.running):
            assert len(sequence.blocks) * block_size >= sequence.length  # room for what is cached
            scheduler.record(sequence, data.draw(st.integers(0, 3)))
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.blocks.free == count
    assert admitted == added  # in order
    for sequence in added:
        stopped = sequence.generated[-1] == 0
        assert sequence.finish == ("stop" if stopped else "length")
        assert 0 not in sequence.generated[:-1]
        assert stopped or len(sequence.generated) == sequence.limit


def test_blocks_cannot_be_given_back_twice_or_taken_from_nothing() -> None:
    blocks = Blocks(2, 4)
    taken = blocks.take(2)
    with pytest.raises(TargetError) as caught:
        blocks.take(1)
    assert str(caught.value) == "KV cache: 1 blocks wanted and 0 free; ask for more"
    blocks.give_back(taken)
    with pytest.raises(TargetError) as caught:
        blocks.give_back(taken)
    assert str(caught.value) == f"KV cache: block {taken[0]} is free already; give it back once"


@pytest.mark.parametrize("blocks", [3, 5, 16])  # with few, prompts wait for others to end
def test_mixed_prompts_generate_what_each_does_alone(artifact: Artifact, blocks: int) -> None:
    alone = [generate(loaded(artifact), [p], most=20).sequences[0].generated for p in PROMPTS]
    together = generate(loaded(artifact, blocks), PROMPTS, most=20)
    assert [sequence.generated for sequence in together.sequences] == alone
    assert together.statistics.prefill_tokens == sum(map(len, PROMPTS))
    assert together.statistics.decode_tokens == 19 * len(PROMPTS)
    assert together.statistics.cache_bytes_allocated == blocks * BLOCK * 512
    assert together.statistics.cache_bytes_used <= blocks * BLOCK * 512
    assert together.statistics.float16_bytes_per_token == 2 * together.statistics.bytes_per_token


def test_generation_ends_at_a_stop_token_and_tells_of_each_token(artifact: Artifact) -> None:
    whole = generate(loaded(artifact), PROMPTS[:1], most=8).sequences[0].generated
    stop = whole[5]
    seen: list[int] = []
    cut = generate(
        loaded(artifact),
        PROMPTS[:1],
        most=8,
        stops=frozenset([stop]),
        on_token=lambda _, token: seen.append(token),
    ).sequences[0]
    assert cut.generated == seen == whole[: whole.index(stop) + 1]
    assert cut.finish == "stop"


def test_decode_gives_what_prefill_gives_up_to_rounding(artifact: Artifact) -> None:
    """Prefill reads its own float K and V and decode the int8 ones, so they differ a little."""
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    model = loaded(artifact)
    every = model.prefill([tokens], [[4]], every=True)
    assert every.shape == (8, 512)
    model.prefill([tokens[:-1]], [[7]])
    last = model.decode(tokens[-1:], [8], [[7]])
    spread = every[-1].float().std()
    assert (last[0].float() - every[-1].float()).abs().max() < spread * 0.25


def test_a_captured_program_runs_with_caches_that_it_gives_anew(tiny_model) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    program = capture(checkpoint)
    both = {"prefill": program, "decode": program}
    model = load(both, partial(make, read=checkpoint.read), blocks=16, block_size=4)
    found = generate(model, [[5, 9, 17], [33, 65, 12, 40, 41]], most=6)
    for sequence in found.sequences:
        tokens = [*sequence.prompt, *sequence.generated]
        again = load(both, partial(make, read=checkpoint.read), blocks=4, block_size=4)
        logits = again.prefill([tokens], [[3, 1, 2]], every=True)
        start = len(sequence.prompt) - 1
        assert logits[start:-1].argmax(1).tolist() == sequence.generated


def test_everything_a_program_may_take() -> None:
    batch = [Rows([10, 11, 12], 0, [3, 1]), Rows([20], 4, [0, 2, 5])]
    found = inputs(batch, 2, torch.device("cpu"))
    plain = {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in found.items()}
    assert plain == {
        "input_ids": [10, 11, 12, 20],
        "positions": [0, 1, 2, 4],
        "logits_rows": [2, 3],
        "slot_mapping": [6, 7, 2, 10],
        "block_table": [[3, 1, 0], [0, 2, 5]],
        "seq_lens": [3, 5],
        "query_starts": [0, 3, 4],
        "query_ends": [3, 4],
        "kv_lens": [3, 5],
        "kv_ends": [3, 8],
        "kv_slots": [6, 7, 2, 0, 1, 4, 5, 10],
    }


PACKED = """
def lowered(
    input_ids: i64[T],
    logits_rows: i64[R],{extra}
    k_scale_0: f32[16] = cast(stored("scale"), f32),
    k_cache_0: i8[N, S, 1, 4] = cache(),
):
    rows: i64[R] = aten.index_select(input_ids, 0, logits_rows)
    wide: i64[R, 1] = aten.unsqueeze(rows, 1)
    logits: f32[R, 16] = aten.mul.Tensor(wide, k_scale_0)
    return [logits, k_cache_0]
"""


@pytest.mark.parametrize(("extra", "calls"), [("\n    query_ends: ints[B],", 1), ("", 2)])
def test_prompts_go_together_where_the_program_tells_them_apart(extra, calls) -> None:
    program = parse(PACKED.format(extra=extra))
    model = load(
        {"prefill": program, "decode": program},
        partial(make, read=lambda _: torch.ones(16)),
        blocks=4,
        block_size=2,
    )
    seen = []
    logits = model.prefill(
        [[1, 2], [3]], [[0], [1]], observe=lambda node, _: seen.append(node.name)
    )
    assert logits[:, 0].tolist() == [2, 3]
    assert seen.count("logits") == calls


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_refused(bad: float) -> None:
    program = parse(PACKED.format(extra=""))
    scale = torch.ones(16)
    scale[7] = bad
    with pytest.raises(TargetError) as caught:
        load({"decode": program}, partial(make, read=lambda _: scale), blocks=4, block_size=2)
    what = "has a KV scale that is zero, negative or not a number"
    assert str(caught.value) == f"k_scale_0: {what}; compile a model whose shards hold its weights"


def test_an_unknown_input_is_refused() -> None:
    program = parse(PACKED.format(extra="\n    rope: i64[T],"))
    with pytest.raises(IRError) as caught:
        load({"decode": program}, partial(make, read=torch.zeros), blocks=4, block_size=2)
    assert str(caught.value) == (
        "rope: is no input that the runtime gives; use block_table, input_ids, kv_ends, "
        "kv_lens, kv_slots, logits_rows, positions, query_ends, query_starts, seq_lens, "
        "slot_mapping"
    )


def test_a_prompt_that_can_never_fit_is_refused(artifact: Artifact) -> None:
    with pytest.raises(TargetError) as caught:
        generate(loaded(artifact, 2), [[1], [1] * 60], most=10)
    assert str(caught.value) == (
        "prompt 2: 60 tokens and 10 to generate take 3 blocks of 32 and the cache has 2; "
        "allow 3 blocks or generate fewer tokens"
    )
    with pytest.raises(TargetError) as caught:
        generate(loaded(artifact, 2), [[]], most=10)
    assert str(caught.value) == ("prompt 1: has no tokens, or none to generate; give at least one")


def test_a_token_outside_its_blocks_is_refused(artifact: Artifact) -> None:
    with pytest.raises(TargetError) as caught:
        loaded(artifact).decode([1], [33], [[0]])
    assert str(caught.value) == (
        "position 32: lies outside the 1 blocks of its sequence; give the sequence more blocks"
    )


def test_shards_without_data_compile_and_do_not_run(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    shard = tmp_path / "model" / "quant_model_weight_w8a8.safetensors"
    data = shard.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    shard.unlink()
    shard.write_bytes(data[:head] + bytes(len(data) - head))
    checkpoint = open_checkpoint(tmp_path / "model")
    with pytest.warns(UserWarning, match="every kv_cache_scale is zero"):
        program = capture(checkpoint)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    write(tmp_path / "out", checkpoint, lowered, CompiledFor("ascend910b", BLOCK))
    with pytest.raises(TargetError, match=r"has a KV scale that is zero, negative or not a number"):
        loaded(read(tmp_path / "out"))


def test_sampling_is_repeatable_and_keeps_to_the_likeliest() -> None:
    logits = torch.tensor([1.0, 3.0, 2.5, -4.0]).half()
    assert choose(logits, Sampling(), Sampling().generator(0)) == 1
    random = Sampling(temperature=1.0, top_p=0.9, seed=3)
    drawn = [[choose(logits, random, g) for _ in range(200)] for g in [random.generator(0)] * 1]
    again = random.generator(0)
    assert drawn[0] == [choose(logits, random, again) for _ in range(200)]
    assert set(drawn[0]) == {1, 2}  # their probabilities are 0.57 and 0.35, so they reach 0.9
    narrow = Sampling(temperature=1.0, top_p=0.01)
    assert {choose(logits, narrow, narrow.generator(i)) for i in range(20)} == {1}


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"temperature": -1.0}, "temperature: is -1.0; give 0 or a positive number"),
        ({"temperature": float("nan")}, "temperature: is nan; give 0 or a positive number"),
        ({"top_p": 0.0}, "top_p: is 0.0; give a number above 0 and at most 1"),
    ],
)
def test_sampling_that_cannot_be(sampling, sentence) -> None:
    with pytest.raises(TargetError) as caught:
        Sampling(**sampling)
    assert str(caught.value) == sentence


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(TargetError) as caught:
        choose(torch.tensor([1.0, float("nan")]), Sampling(), torch.Generator())
    assert str(caught.value) == "logits: hold no numbers; check the model with kvc8-verify"
