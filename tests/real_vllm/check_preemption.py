"""Where the cache is too small, sequences lose their blocks, and say what they said otherwise.

In float64 (plugin/kvc8_checks.py): what is computed again, in other steps, is the same but for
rounding, which decides nothing.
"""

from vllm import LLM, SamplingParams, TokensPrompt

BLOCK = 16


def metric(llm: LLM, name: str) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == f"vllm:{name}")


def free_blocks(llm: LLM) -> tuple[int, int]:
    """The free blocks, and all but the one that vLLM keeps for itself."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def test_tokens_are_the_loops_when_sequences_are_preempted(made, prompts, generated) -> None:
    """The cache holds eight prompts and one block more, and each sequence grows over an edge.

    Short ones: the blocks of one that is preempted soon are not enough again. Eight more wait for
    room, and none reads what another wrote.
    """
    some = [0, 1] * 8
    few = [prompts[i] for i in some]
    blocks = sum(-(-len(prompt) // BLOCK) for prompt in few[:8]) + 2
    llm = LLM(
        model=str(made / "exact"),
        max_model_len=64,
        enforce_eager=True,
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=blocks * BLOCK * 11520,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        disable_log_stats=False,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=len(generated[0]), ignore_eos=True)
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in few]
    outputs = llm.generate(given, sampling, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert found == [generated[i] for i in some]
    assert metric(llm, "num_preemptions") >= 4
    free, count = free_blocks(llm)
    assert free == count
