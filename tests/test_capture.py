"""A captured program computes what transformers computes, however its layers were traced."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.steps import step, values
from transformers import AutoModelForCausalLM

from kvc8.ir.capture import trace
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.program import Program
from kvc8.ir.run import run
from kvc8.ir.text import parse, show

# `tools/check --quick` has one of a kind of layer, and one of two.
KINDS = (
    "llama",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2", "qwen3", "mistral")),
    "gemma3",
)


def reference(directory: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """`model(kind, tied=False)`: a tiny model of three layers, or with layers of two kinds four."""

    def model(kind: str, tied: bool = False) -> Path:
        return tiny_model(kind, tied, **({} if kind == "gemma3" else {"num_hidden_layers": 3}))

    return model


@pytest.fixture(scope="session")
def captured(model: Callable[..., Path]) -> Callable[..., Program]:
    """`captured(kind, tied=False)`: the program of such a model, captured once."""

    @functools.cache
    def captured(kind: str, tied: bool = False) -> Program:
        return capture(open_checkpoint(model(kind, tied)))

    return captured


def keep_caches(program: Program, made: dict[str, torch.Tensor], results: list[torch.Tensor]):
    made.update({c.name: r for c, r in zip(program.caches(), results[1:], strict=True)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_prefill_and_decode_agree_with_transformers(kind, tied, captured, model):
    directory, program = model(kind, tied), captured(kind, tied)
    made = values(program, directory)
    tokens = torch.randint(3, 128, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    want = reference(directory, tokens)
    table = [[7, 2, 11, 5, 9]]
    results = run(program, {**made, **step(tokens[:14], [0], [14], table)})
    assert (results[0] - want[:14]).abs().max() < 1e-5
    for p in range(14, 19):  # one token after the other, out of the cache
        keep_caches(program, made, results)
        results = run(program, {**made, **step(tokens[p : p + 1], [p], [p + 1], table)})
        assert (results[0] - want[p : p + 1]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stamped_and_unstamped_programs_are_equal(kind, captured, model):
    whole = capture(open_checkpoint(model(kind)), stamped=False)
    assert show(captured(kind)) == show(whole)


@pytest.mark.slow
def test_layers_that_code_tells_apart_by_number_are_stamped(tiny_model, monkeypatch):
    """Two of three dense layers and two of four with experts are traced, which a model of four
    layers would not have.
    """
    sizes = {"num_hidden_layers": 7, "first_k_dense_replace": 3}
    checkpoint = open_checkpoint(tiny_model("glm4_moe", **sizes))
    whole = show(capture(checkpoint, stamped=False))
    monkeypatch.delattr(trace, "_trace_whole")
    assert show(capture(checkpoint)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_captured_program_reads_back(kind, captured):
    text = show(captured(kind))
    assert show(parse(text)) == text


def test_a_mixed_batch_gives_what_its_sequences_give_alone(captured, model):
    """A fresh prefill, a decode step and a padded slot in one batch, with shuffled blocks."""
    directory, program = model("llama"), captured("llama")
    a = [5, 9, 17, 33, 65, 12]
    b = [40, 41, 42, 43, 44, 45, 46, 47, 48]
    made = values(program, directory)
    alone_a = run(program, {**made, **step(a, [0], [6], [[3, 8, 0]])})[0]
    before = run(program, {**made, **step(b[:-1], [0], [8], [[12, 1, 6]])})
    keep_caches(program, made, before)
    alone_b = run(program, {**made, **step(b[-1:], [8], [9], [[12, 1, 6]])})[0]
    mixed = step([*a, b[-1]], [0, 8], [6, 9], [[14, 2, 0], [12, 1, 6]])
    mixed["input_ids"] = torch.cat([mixed["input_ids"], torch.tensor([99])])  # the padding
    mixed["positions"] = torch.cat([mixed["positions"], torch.tensor([0])])
    pad = torch.tensor([-1], dtype=torch.int32)
    mixed["slot_mapping"] = torch.cat([mixed["slot_mapping"], pad])
    results = run(program, {**made, **mixed})
    assert (results[0][:6] - alone_a).abs().max() < 1e-5
    assert (results[0][6:7] - alone_b).abs().max() < 1e-5
    untouched = [block for block in range(16) if block not in (14, 2, 12, 1, 6)]
    for cache, new in zip(program.caches(), results[1:], strict=True):
        assert torch.equal(new[untouched], made[cache.name][untouched])
