"""Whatever vLLM schedules, the tokens are those of kvc8's own loop: in float64, where rounding
decides nothing (plugin/kvc8_checks.py). Prompts of 30 to 600 tokens, eight at once.
"""

from collections.abc import Callable

import pytest
from vllm import LLM, SamplingParams, TokensPrompt

BLOCK = 16
Engine = Callable[..., LLM]


@pytest.fixture
def engine(made) -> Engine:
    """`engine(blocks, chunk, longest)`: vLLM with so many blocks of cache, and such chunks and
    requests, in tokens. It does not start where the cache cannot hold the longest request.
    """

    def engine(blocks: int, chunk: int, longest: int, **options: bool) -> LLM:
        return LLM(
            model=str(made / "exact"),
            max_model_len=longest,
            enforce_eager=True,
            num_gpu_blocks_override=blocks,
            kv_cache_memory_bytes=blocks * BLOCK * 11520,
            max_num_seqs=8,
            max_num_batched_tokens=chunk,
            disable_log_stats=False,
            **options,
        )

    return engine


def continued(llm: LLM, prompts: list[list[int]], most: int) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(given, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: LLM, name: str) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == f"vllm:{name}")


def free_blocks(llm: LLM) -> tuple[int, int]:
    """The free blocks, and all but the one that vLLM keeps for itself."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def test_in_chunks_and_with_a_prefix_cache_cold_and_warm(engine, prompts, generated) -> None:
    llm, most = engine(160, 256, 1024), len(generated[0])
    assert continued(llm, prompts, most) == generated
    found = metric(llm, "prefix_cache_hits")
    assert continued(llm, prompts, most) == generated
    assert metric(llm, "prefix_cache_hits") > found  # and blocks were found, not computed
    free, count = free_blocks(llm)
    assert free == count


def test_when_sequences_are_preempted(engine, prompts, generated) -> None:
    """The cache holds eight prompts and one block more, and each sequence grows over an edge.

    Short ones: the blocks of one that is preempted soon are not enough again. Eight more wait for
    room, and none reads what another wrote.
    """
    some = [0, 1] * 8
    few = [prompts[i] for i in some]
    blocks = sum(-(-len(prompt) // BLOCK) for prompt in few[:8])
    llm = engine(blocks + 2, 1024, 64, enable_prefix_caching=False)
    assert continued(llm, few, len(generated[0])) == [generated[i] for i in some]
    assert metric(llm, "num_preemptions") >= 4
    free, count = free_blocks(llm)
    assert free == count
