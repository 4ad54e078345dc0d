"""A program cut before its head says what the whole one says; a batch is cut, not read."""

import pytest
import torch

from kvc8.backends.runtime.calls import calls
from kvc8.backends.runtime.head import body, head
from kvc8.backends.runtime.inputs import CPU, KNOWN, Rows, batch_of, inputs_of
from kvc8.ir.errors import IRError
from kvc8.ir.ranks import COLLECTIVES
from kvc8.ir.run import run
from kvc8.ir.text import parse, show

WHOLE = """
def quantized(
    input_ids: i64[T],
    slot_mapping: i32[T],
    logits_rows: i64[R],{extra}
    embed: f32[16, 4] = stored("embed"),
    lm_head: f32[16, 4] = stored("lm_head"),
    k_cache_0: f32[N, S, 1, 4] = cache(),
):
    rows: f32[T, 4] = aten.embedding(embed, input_ids)
    shaped: f32[T, 1, 4] = aten.reshape(rows, [-1, 1, 4])
    written: f32[N, S, 1, 4] = kvc8.cache_write(k_cache_0, shaped, slot_mapping)
    wanted: f32[R, 4] = aten.index_select(rows, 0, logits_rows)
    {head}
    return [logits, written]
"""
LINEAR = "logits: f32[R, 16] = aten.linear(wanted, lm_head)"
SHIFTED = """plain: f32[R, 16] = aten.linear(wanted, lm_head)
    logits: f32[R, 16] = aten.add.Tensor(plain, shift)"""
SUMMED = """part: f32[R, 16] = aten.linear(wanted, lm_head)
    sum: f32[R, 16] = _c10d_functional.all_reduce(part, 'sum', 'tp')
    logits: f32[R, 16] = _c10d_functional.wait_tensor(sum)"""


def test_the_body_and_the_head_give_what_the_whole_gives() -> None:
    whole = parse(WHOLE.format(extra="", head=LINEAR))
    random = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(16, 4, generator=random) for n in ("embed", "lm_head")}
    ids, slots = torch.tensor([3, 1, 4, 1]), torch.tensor([2, 3, 4, 5], dtype=torch.int32)
    given = {"input_ids": ids, "slot_mapping": slots, "k_cache_0": torch.zeros(2, 4, 1, 4)}
    wanted = torch.tensor([3, 0])
    logits, cache = run(whole, {**weights, **given, "logits_rows": wanted})
    hidden, same = run(body(whole), {**weights, **given})
    assert torch.equal(same, cache)
    assert torch.equal(run(head(whole), {**weights, "hidden": hidden[wanted]})[0], logits)


def test_each_half_takes_what_it_needs_and_the_whole_stays() -> None:
    whole = parse(WHOLE.format(extra="", head=LINEAR))
    before = show(whole)
    first, last = body(whole), head(whole)
    assert show(whole) == before
    assert [node.name for node in first.inputs()] == ["input_ids", "slot_mapping"]
    assert [node.name for node in first.parameters()] == ["embed"]
    assert [node.name for node in last.inputs()] == ["hidden"]
    assert [node.name for node in last.parameters()] == ["lm_head"]
    assert not last.caches()


def test_what_ranks_do_together_goes_with_its_half() -> None:
    whole = parse(WHOLE.format(extra="", head=SUMMED))
    assert not body(whole).calls(*COLLECTIVES)
    assert len(head(whole).calls(*COLLECTIVES)) == 2


def test_a_program_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(IRError) as caught:
        head(parse(WHOLE.format(extra="\n    shift: f32[16],", head=SHIFTED)))
    what = "is read after the rows of logits are chosen"
    assert str(caught.value) == f"shift: {what}; compile the model again"
    text = WHOLE.format(extra="", head="logits: f32[R, 16] = aten.linear(wanted, lm_head)")
    text = text.replace(
        "aten.index_select(rows, 0, logits_rows)", "aten.embedding(rows, logits_rows)"
    )
    with pytest.raises(IRError) as caught:
        body(parse(text))
    what = "does not choose rows once, by an index"
    assert str(caught.value) == f"logits_rows: {what}; compile the model again"


def test_a_part_of_a_batch_is_the_batch_of_that_part() -> None:
    rows = [
        Rows([7], 40, [3, 9, 4]),
        Rows([5, 6, 7], 14, [0, 5]),
        Rows([1, 2], 0, [8]),
        Rows(list(range(20)), 0, [2, 6]),
    ]
    names = (*KNOWN, "window_5_table", "window_5_lens", "window_5_hidden")
    whole = batch_of(rows, 16, CPU)
    for first, last in ((0, 1), (1, 2), (1, 4), (2, 4), (0, 4)):
        found = inputs_of(whole.take(first, last), names)
        wanted = inputs_of(batch_of(rows[first:last], 16, CPU), names)
        for name in names:
            a, b = found[name], wanted[name]
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_the_tensors_of_a_part_are_views_of_the_batch() -> None:
    whole = batch_of([Rows([7], 3, [1]), Rows([5, 6], 0, [0])], 16, CPU)
    part = whole.take(1, 2)
    assert part.tokens.data_ptr() == whole.tokens[1:].data_ptr()
    assert part.slots.data_ptr() == whole.slots[1:].data_ptr()


def test_phases_that_are_one_program_go_in_one_call() -> None:
    one = parse(WHOLE.format(extra="\n    query_ends: ints[B],", head=LINEAR))
    alone = parse(WHOLE.format(extra="", head=LINEAR))
    counts, lengths = [1, 3, 2, 5], [9, 7, 2, 5]  # of decode, chunk, prefill and prefill
    same = dict.fromkeys(("prefill", "chunk", "decode"), one)
    assert [chosen for _, chosen in calls(same, counts, lengths)] == [[0, 1, 2, 3]]
    apart = {"prefill": alone, "chunk": one, "decode": alone}
    assert calls({**apart, "decode": parse(show(alone))}, counts, lengths) == [
        ("prefill", [2]),
        ("prefill", [3]),
        ("chunk", [1]),
        ("decode", [0]),
    ]
