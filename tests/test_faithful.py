"""What differs from transformers' own model is found, and named where it differs first."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.capture_faults import FAULTS
from support.tiny_models import write_model

from kvc8.ir.capture import attention
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program
from kvc8.tools.driver.faithful import hold

TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11, 71, 9, 100]
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
SENTENCE = (
    r"\S+: the captured program's logits are \S+ off of \S+ from transformers' own {model}, "
    r"from (token \d+|a decode step) on, first in {first}; "
    "do not trust what is compiled of it, and report the model"
)


@pytest.fixture(scope="session")
def captured(tiny_model: Callable[..., Path]) -> Callable[[str], tuple[Path, Program]]:
    """`captured(kind)`: a model of two layers and its program, captured once."""

    @functools.cache
    def captured(kind: str) -> tuple[Path, Program]:
        directory = tiny_model(kind, num_hidden_layers=2)
        return directory, capture(open_checkpoint(directory), torch.float32)

    return captured


def check(problem: ModelError | None, model: str, first: str) -> None:
    assert problem is not None
    pattern = SENTENCE.format(model=model, first=re.escape(first))
    assert re.fullmatch(pattern, str(problem)), str(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name, captured):
    fault, kind, first = FAULTS[name]
    directory, sound = captured(kind)
    broken = sound.copy()
    fault(broken)
    found = hold(open_checkpoint(directory), broken, TOKENS, steps=2)
    check(found.problem, f"{kind.capitalize()}ForCausalLM", first)
    assert hold(open_checkpoint(directory), sound, TOKENS, steps=2).problem is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_code_makes_is_rounded_as_the_program_computes(dtype, tmp_path):
    """Gemma's scale of its embedding, sqrt(48), whatever dtype the files have."""
    write_model(tmp_path, "gemma3", 0, {"hidden_size": 48}, torch.float16)
    checkpoint = open_checkpoint(tmp_path)
    assert hold(checkpoint, capture(checkpoint, dtype), TOKENS).problem is None


@pytest.mark.slow
def test_a_dropped_mask_is_found_and_named(tiny_model, monkeypatch):
    """What capture did before it looked at masks."""
    monkeypatch.setattr(attention, "_window", lambda where, mask, told: told or 0)
    directory = tiny_model("gemma3", use_bidirectional_attention=True)
    checkpoint = open_checkpoint(directory)
    found = hold(checkpoint, capture(checkpoint, torch.float32), TOKENS)
    first = "the attention of model.layers.0.self_attn (scale 0.1768, window 5)"
    check(found.problem, "Gemma3ForCausalLM", first)
