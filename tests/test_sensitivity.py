"""kvc8-verify sensitivity: each figure is that of a program with only that cache quantized."""

import json
from pathlib import Path

import pytest
import torch

from kvc8.backends.runtime import model as runtime
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.expression import Expression, make
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.insert_kv_quant import insert_kv_quant
from kvc8.passes.remove_identities import remove_identities
from kvc8.passes.repair_rope_scales import repair_rope_scales
from kvc8.tools import command, verify
from kvc8.tools.evaluator.divergence import Figures
from kvc8.tools.verifier.sensitivity import sensitivity

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
LLAMA = CHECKPOINTS / "llama_fp16_m3" / "quant"
ASYMMETRIC = CHECKPOINTS / "qwen2_fp16_none_asym" / "quant"
FLOAT = CHECKPOINTS / "llama_fp16_m3" / "orig"
PROMPT = [5 + 7 * i % 90 for i in range(24)]


def logits(checkpoint: Checkpoint, captured: Program, quantized: list[int]) -> torch.Tensor:
    """What the program gives whose caches of those numbers are int8, by its own pass."""
    program = captured.copy()
    pipeline.run(program, (remove_identities, repair_rope_scales))
    for i, cache in enumerate(program.caches()):
        if i not in quantized:
            cache.meta["expression"] = Expression("cache")
    if quantized:
        insert_kv_quant(program)
    model = runtime.load(
        {"prefill": program, "decode": program},
        lambda expression: make(expression, checkpoint.read),
        blocks=1,
        block_size=128,
    )
    return model.prefill([PROMPT], [[0]], every=True)


@pytest.mark.slow
@pytest.mark.parametrize("directory", [LLAMA, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_each_figure_is_that_of_a_program_with_only_that_cache_in_int8(directory):
    checkpoint = open_checkpoint(directory)
    costs = sensitivity(checkpoint, PROMPT)
    captured = capture(checkpoint, torch.float32)
    base = logits(checkpoint, captured, [])
    count = len(costs) - 1
    for i, quantized in {0: [0], 3: [3], count: list(range(count))}.items():
        wanted = Figures()
        wanted.add(logits(checkpoint, captured, quantized), base, torch.tensor(PROMPT))
        assert wanted.kl_mean > 0
        # The same ops on the same values, in the same order: equal to the last bit.
        assert (costs[i].kl, costs[i].kl_p99) == (wanted.kl_mean, wanted.kl_p99)
        assert costs[i].top1 == wanted.top1
    assert [(c.layer, c.cache) for c in costs[:4]] == [
        *(("layer 0", "K"), ("layer 0", "V"), ("layer 1", "K"), ("layer 1", "V"))
    ]
    assert (costs[-1].layer, costs[-1].cache) == ("all", "K and V")


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(capsys):
    options = ["sensitivity", str(LLAMA), "--tokens", "12"]
    assert command.entry(verify.parser(), verify.work, options) == 0
    said = capsys.readouterr().out
    assert "12 tokens of prompt, float linears, against a float cache; KL in nats" in said
    assert "layer 3" in said
    assert "all at once: KL" in said
    assert command.entry(verify.parser(), verify.work, [*options, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)[0]) == {"layer", "cache", "kl", "kl_p99", "top1"}


@pytest.mark.slow
def test_a_checkpoint_without_scales_is_refused(capsys):
    assert command.entry(verify.parser(), verify.work, ["sensitivity", str(FLOAT)]) == 1
    what = "has no scales for its KV cache; quantize it first, with kvc8-quantize"
    assert capsys.readouterr().err == f"error: {FLOAT}: {what}\n"


def test_one_token_says_nothing_about_the_next(capsys):
    given = ["sensitivity", str(LLAMA), "--tokens", "1"]
    assert command.entry(verify.parser(), verify.work, given) == 1
    what = "has fewer than 2 tokens; give a longer one, by --text"
    assert capsys.readouterr().err == f"error: the prompt: {what}\n"
