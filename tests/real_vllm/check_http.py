"""vLLM's OpenAI server, in processes of its own, as people run it: one for all checks of this file.

It serves the float64 model of plugin/kvc8_checks.py, in which rounding decides nothing, so that
tokens may be compared one by one: whatever vLLM schedules, they are those of kvc8's own loop. The
last check asks whether anything is left in the cache of what the others sent.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai_server import serving

BLOCK, BLOCKS, LONGEST = 16, 160, 1024  # the cache holds 2560 tokens, a request up to 1024
UNIT = 2.0**-24  # the unit roundoff of float32

Ask = Callable[..., dict]


@pytest.fixture(scope="module")
def server(made, tmp_path_factory) -> Iterator[str]:
    """The address of the server. It takes prompts in chunks of 256 tokens."""
    options = {
        "max-model-len": LONGEST,
        "num-gpu-blocks-override": BLOCKS,
        "kv-cache-memory-bytes": BLOCKS * BLOCK * 11520,
        "max-num-seqs": 64,
        "max-num-batched-tokens": 256,
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(made / "exact", "exact", options, log) as address:
        yield address


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    """Connections to the server, as many as requests are under way."""
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server, timeout=300, limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def ask(client) -> Ask:
    """`ask(prompt, most, ...)`: what the server answers, greedily but for what is given."""

    def ask(prompt: list[int], most: int, **options: object) -> dict:
        answer = client.post("/v1/completions", json=asked(prompt, most, **options))
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


def asked(prompt: list[int], most: int, **options: object) -> dict[str, object]:
    greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "exact", "prompt": prompt, "max_tokens": most, **greedy, **options}


def events(client: httpx.Client, prompt: list[int], most: int) -> Iterator[list[int]]:
    """The tokens of a stream as they come; the connection is closed where the reader stops."""
    body = asked(prompt, most, stream=True)
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]


def metric(client: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.split("{")[0] == f"vllm:{name}"]
    assert found, name
    return sum(float(line.rpartition(" ")[2]) for line in found)


def taken(client: httpx.Client) -> tuple[float, ...]:
    """The requests that run, those that wait, and the share of the cache's blocks that is taken."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return tuple(metric(client, name) for name in names)


def comes_to_rest(client: httpx.Client) -> bool:
    """Whether within 20 s nothing runs or waits, and every block is free."""
    for _ in range(100):
        if not any(taken(client)):
            return True
        time.sleep(0.2)
    return False


def test_eight_streams_say_what_the_loop_says_and_say_it_again(client, prompts, generated) -> None:
    def told(prompt: list[int]) -> list[tuple[float, int]]:
        stream = events(client, prompt, len(generated[0]))
        return [(time.monotonic(), token) for tokens in stream for token in tokens]

    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(told, prompts))
    assert [[token for _, token in each] for each in found] == generated
    assert max(each[0] for each in found)[0] < min(each[-1] for each in found)[0]  # all at once
    # Again, where blocks are found and not computed.
    before = metric(client, "prefix_cache_hits_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        again = pool.map(told, prompts)
        assert [[token for _, token in each] for each in again] == generated
    assert metric(client, "prefix_cache_hits_total") > before


def test_log_probabilities_of_a_prompt_are_those_of_the_program(ask, made, prompts) -> None:
    """To what vLLM's float32 costs: it rounds N logits up to M in size, and takes the log_softmax.

    A logit less the greatest is off by 4M units: two roundings of logits, and one of a difference
    up to 2M. So an exponential is off by 4M relative units and 8 of its own, their sum by N more,
    and its logarithm by as many absolute ones. The last two differences round 6M and 12 more.
    """
    known = json.loads((made / "tokens.json").read_text())["first_prompt"]
    greatest = known["greatest"]
    of_sum = (known["vocabulary"] + 4 * greatest + 8) * UNIT
    most = of_sum / (1 - of_sum) + (6 * greatest + 12) * UNIT
    [choice] = ask(prompts[0], 1, prompt_logprobs=0)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token, given, wanted in zip(prompts[0][1:], rest, known["log_probabilities"], strict=True):
        assert abs(given[str(token)]["logprob"] - wanted) <= most


def test_two_answers_from_a_seed_are_the_same_two_again(ask, prompts) -> None:
    def two() -> list[list[int]]:
        found = ask(prompts[0], 12, n=2, seed=7, temperature=1.0)["choices"]
        return [choice["token_ids"] for choice in sorted(found, key=lambda c: c["index"])]

    one, other = two()
    assert len(one) == len(other) == 12
    assert one != other
    assert two() == [one, other]


def test_a_stop_string_ends_an_answer_before_it(ask, prompts, generated) -> None:
    [whole] = ask(prompts[1], len(generated[1]))["choices"]
    stop = whole["text"][len(whole["text"]) // 2 :][:6]
    [choice] = ask(prompts[1], len(generated[1]), stop=[stop])["choices"]
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert len(choice["token_ids"]) < len(generated[1])


def test_a_stream_whose_reader_goes_away_is_ended(client, prompts, generated) -> None:
    """It would have run for 900 tokens."""
    before = metric(client, "generation_tokens_total")
    stream = events(client, prompts[0], 900)
    seen = next(stream) + next(stream)
    running, waiting, share = taken(client)
    stream.close()
    assert seen == generated[0][: len(seen)]
    assert (running, waiting) == (1, 0)
    assert share > 0
    assert comes_to_rest(client)
    assert metric(client, "generation_tokens_total") - before < 450


def test_sixty_four_at_once_say_what_the_loop_says(ask, prompts, generated) -> None:
    def told(i: int) -> list[int]:
        [choice] = ask(prompts[i], 6)["choices"]
        return choice["token_ids"]

    some = [0, 1, 2, 3] * 16
    with ThreadPoolExecutor(len(some)) as pool:
        assert list(pool.map(told, some)) == [generated[i][:6] for i in some]


def test_what_is_longer_than_the_cache_is_refused_and_the_next_answered(
    client, ask, prompts, generated
) -> None:
    prompt = prompts[-1] * 5
    assert len(prompt) > BLOCK * BLOCKS
    answer = client.post("/v1/completions", json=asked(prompt, 1))
    assert answer.status_code == 400
    assert f"maximum context length is {LONGEST} tokens" in answer.json()["error"]["message"]
    [choice] = ask(prompts[0], 3)["choices"]
    assert choice["token_ids"] == generated[0][:3]


def test_after_all_of_it_every_block_is_free(client) -> None:
    """The usage that vLLM tells is of blocks that are not free, of all but the one it keeps."""
    assert metric(client, "generation_tokens_total") > 64 * 6  # the server is the others'
    assert comes_to_rest(client), taken(client)
