"""An artifact of kvc8-compile, its linears float, served over HTTP, says what kvc8-run says."""

import json

import httpx
from openai_server import serving

# One thread, as kvc8-run had (compile.py): more may add floats in another order.
ALONE = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def test_texts_are_continued_as_kvc8_run_does(made, tmp_path) -> None:
    """One after the other: rows of others in a product may change how its sums are added up."""
    texts = json.loads((made / "tokens.json").read_text())["texts"]
    options = {"max-model-len": 256, "kv-cache-memory-bytes": 8 * 128 * 11520}
    with serving(made / "c8-npu", "c8", options, tmp_path / "log", **ALONE) as address:
        for known in texts:
            asked = {"model": "c8", "prompt": known["prompt"], "max_tokens": len(known["tokens"])}
            asked |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
            answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=120)
            assert answer.status_code == 200, answer.text
            [choice] = answer.json()["choices"]
            assert choice["token_ids"] == known["tokens"]
            assert choice["text"] == known["text"]
