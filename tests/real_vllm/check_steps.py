"""Each step that vLLM ran with a W8A8 artifact, run again by kvc8's runtime, is equal bit for bit.

What vLLM gave is read into plain lists, and the runtime makes its inputs of those in caches of its
own. Hidden states, logits and the codes in the cache are compared, step by step.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt

from kvc8.backends.npu.embed import load_steps
from kvc8.backends.runtime.inputs import CPU, Batch, Rows, inputs

BLOCKS, NEW = 40, 16


@dataclass
class Call:
    """One run of one program."""

    phase: str
    rows: list[Rows]
    slots: Tensor
    hidden: Tensor
    codes: list[Tensor]  # of each cache, at the slots that were written


@dataclass
class Watched:
    """What vLLM's model was asked for."""

    calls: list[Call] = field(default_factory=list)
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # hidden states and logits


def rows_of(batch: Batch) -> list[Rows]:
    ends, tokens, tables = [0, *batch.ends], batch.tokens.tolist(), batch.tables.tolist()
    found = []
    for i, (first, last) in enumerate(pairwise(ends)):
        length = batch.lengths[i]
        table = tables[i][: -(-length // batch.block_size)]
        found.append(Rows(tokens[first:last], length - (last - first), table))
    return found


def at(caches: list[Tensor], slots: Tensor) -> list[Tensor]:
    return [cache.flatten(0, 1)[slots.long()].clone() for cache in caches]


def watch(model) -> Watched:
    seen = Watched()
    call, logits = model.call, model.compute_logits

    def watched_call(phase, batch, caches):
        hidden = call(phase, batch, caches)
        codes = at(caches, batch.slots)
        seen.calls.append(Call(phase, rows_of(batch), batch.slots.clone(), hidden.clone(), codes))
        return hidden

    def watched_logits(hidden):
        found = logits(hidden)
        seen.heads.append((hidden.clone(), found.clone()))
        return found

    model.call, model.compute_logits = watched_call, watched_logits
    return seen


@pytest.fixture(scope="module")
def llm(made) -> LLM:
    return LLM(
        model=str(made / "w8a8-npu"),
        max_model_len=1024,
        enforce_eager=True,
        num_gpu_blocks_override=BLOCKS,
        kv_cache_memory_bytes=BLOCKS * 128 * 11520,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        enable_prefix_caching=True,
    )


def test_a_token_costs_in_vllm_what_it_costs_in_kvc8(llm) -> None:
    """SmolLM2: 30 layers, K and V of 3 heads of 64 int8 values."""
    own = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.layout
    assert own.bytes_per_token == 30 * 2 * 3 * 64
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    [group] = config.kv_cache_groups
    assert len(group.layer_names) * group.kv_cache_spec.page_size_bytes == 128 * own.bytes_per_token
    assert sum(t.size for t in config.kv_cache_tensors) == BLOCKS * 128 * own.bytes_per_token


def test_every_step_is_what_the_runtime_gives(llm, made, prompts) -> None:
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    seen = watch(model)
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=1)
    few = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts[:6]]
    outputs = llm.generate(few, sampling, use_tqdm=False)
    assert {call.phase for call in seen.calls} == {"prefill", "chunk", "decode"}
    own = load_steps(made / "w8a8-npu", CPU, head_apart=True)
    caches = [torch.zeros(c.shape(BLOCKS, 128), dtype=c.dtype) for c in own.layout.caches]
    for call in seen.calls:
        step = getattr(own, call.phase)
        hidden = step(inputs(call.rows, 128, CPU, names=list(step.inputs)), caches)
        assert torch.equal(hidden, call.hidden)
        for found, wanted in zip(at(caches, call.slots), call.codes, strict=True):
            assert torch.equal(found, wanted)
    for hidden, logits in seen.heads:
        assert torch.equal(own.head({"hidden": hidden[None]}, []), logits)
    for prompt, output in zip(few, outputs, strict=True):
        known = output.prompt_logprobs
        assert len(known) == len(prompt["prompt_token_ids"])
        assert all(t in p for t, p in zip(output.prompt_token_ids[1:], known[1:], strict=True))
