"""A model divided among ranks, each a worker of vLLM, says what it says whole.

All its linears are W8A8 and sums over ranks are exact, so no logit differs by a bit from one rank's
(passes/shard.py), and vLLM takes the prompts in the steps of kvc8-run's loop: all whole, then one
token of each. A process a rank, of one thread.
"""

import json

import pytest
from vllm import LLM, SamplingParams, TokensPrompt

BLOCKS, BLOCK = 8, 128


@pytest.mark.parametrize(
    ("name", "ranks", "bytes_per_token"),
    [
        ("tiny", 2, 4 * 2 * 1 * 64),  # layers, K and V, heads of a rank, their channels
        ("w8a8", 3, 30 * 2 * 1 * 64),
    ],
)
def test_ranks_say_what_one_says(made, monkeypatch, name, ranks, bytes_per_token) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    known = json.loads((made / "tokens.json").read_text())["whole"][name]
    llm = LLM(
        model=str(made / f"{name}-{ranks}-ranks"),
        tensor_parallel_size=ranks,
        max_model_len=256,
        enforce_eager=True,
        num_gpu_blocks_override=BLOCKS,
        kv_cache_memory_bytes=BLOCKS * BLOCK * bytes_per_token,
        max_num_batched_tokens=256,
        max_num_seqs=4,
    )
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    [group] = config.kv_cache_groups
    page = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    assert page == BLOCK * bytes_per_token
    assert group.kv_cache_spec.num_kv_heads == 1
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in known["prompts"]]
    few = SamplingParams(temperature=0, max_tokens=len(known["generated"][0]), ignore_eos=True)
    outputs = llm.generate(prompts, few, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == known["generated"]
    llm.llm_engine.engine_core.shutdown()
