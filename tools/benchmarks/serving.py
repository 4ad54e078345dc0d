"""The same prompts at once through vLLM and through kvc8-run's loop, and what a step of vLLM takes.

It runs where vLLM is installed (docs/serving.md), with both in one process and on one artifact.
Prompts are random and begin differently; every sequence is continued greedily to the same length.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.model import Model
from kvc8.ir.errors import TargetError
from kvc8.tools.benchmarks.rows import Timing
from kvc8.tools.driver.loading import open_compiled


def arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("artifact", type=Path, help="what kvc8-compile wrote for npu")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="at once; default: 8")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens; default: 64")
    parser.add_argument("--new", type=int, default=32, metavar="N", help="default: 32 a prompt")


def check_environment() -> None:
    """Raise TargetError where vLLM is not, or would run in a process of its own."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        what = "is not 0, so the steps of vLLM would be another process's"
        raise TargetError("VLLM_ENABLE_V1_MULTIPROCESSING", what, "set it to 0")
    if find_spec("vllm") is None:
        raise TargetError("vllm", "is not installed in this environment", "see docs/serving.md")


class Timed:
    """What is called, with the seconds that all calls took and their number."""

    def __init__(self, called: Any) -> None:
        self.called, self.seconds, self.calls = called, 0.0, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call it, and take the time."""
        start = perf_counter()
        result = self.called(*given, **named)
        self.seconds += perf_counter() - start
        self.calls += 1
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.called, name)


class Serving:
    """Both, ready to take the prompts of the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_environment()
        self.args, self.names = args, count()
        random = torch.Generator().manual_seed(0)
        loaded = open_compiled(args.artifact)
        vocabulary = loaded.config["vocab_size"]
        assert isinstance(vocabulary, int)
        shape = (args.prompts, args.length)
        self.prompts = torch.randint(vocabulary, shape, generator=random).tolist()
        self.own = loaded.allocate([args.length + args.new] * args.prompts, None)
        blocks = args.prompts * -(-(args.length + args.new) // self.own.block_size) + 1
        size = blocks * self.own.block_size * self.own.layout.bytes_per_token
        self.engine = _engine(args, blocks, size)  # a block is vLLM's own

    def cases(self) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
        """How many times as long the loop takes is vLLM's throughput over the loop's.

        Then a step of every kind of row: a call for each phase, as the plug-in runs it, and the
        chunk's program for all of them, one call where it tells sequences apart.
        """
        title = f"{self.args.prompts} of {self.args.length}+{self.args.new}"
        yield title, {"vLLM": self.serve, "kvc8-run's loop": self.loop}
        rows = self.mixed_rows()
        both: dict[str, Callable[[], object]] = {"a call a phase": lambda: self.own.mixed(rows)}
        if isinstance(self.own, Model):
            both["chunk's program for all"] = partial(self.own.chunk, rows)
        yield "a mixed step", both

    def mixed_rows(self) -> list[Rows]:
        """Of four sequences two take a token, one the second half of its prompt, one all of it."""
        length, blocks = self.args.length, -(-self.args.length // self.own.block_size)
        starts = (length - 1, length - 1, length // 2, 0)
        return [
            Rows(prompt[starts[i % 4] :], starts[i % 4], range(i * blocks, (i + 1) * blocks))
            for i, prompt in enumerate(self.prompts)
        ]

    def loop(self) -> None:
        """All prompts, to their ends."""
        found = generate(self.own, self.prompts, most=self.args.new)
        self._check(sum(len(sequence.generated) for sequence in found.sequences))

    def serve(self) -> None:
        """The same by vLLM, which finds nothing of an earlier turn in its cache."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(
            temperature=0, max_tokens=self.args.new, ignore_eos=True, detokenize=False
        )
        for prompt in self.prompts:
            given = TokensPrompt(prompt_token_ids=prompt)
            self.engine.add_request(str(next(self.names)), given, sampling)
        ended = []
        while self.engine.has_unfinished_requests():
            ended += [output for output in self.engine.step() if output.finished]
        self._check(sum(len(output.outputs[0].token_ids) for output in ended))

    def _check(self, generated: int) -> None:
        assert generated == self.args.prompts * self.args.new, generated

    def steps(self) -> list[Timing]:
        """What a step of vLLM took, on average: whole, the compiled programs, kvc8's plug-in.

        The plug-in is all that kvc8 adds to the programs: their inputs, and the hidden states of
        several put together. What remains is vLLM's own.
        """
        programs, around = self._watch()
        start = perf_counter()
        for _ in range(self.args.turns):
            self.serve()
        whole = perf_counter() - start
        inside = sum(step.seconds for step in programs)
        plug_in = sum(part.seconds for part in around) - inside
        parts = {"whole": whole, "the programs": inside, "kvc8's plug-in": plug_in}
        each = [(name, x / around[0].calls * 1e3, x / whole) for name, x in parts.items()]
        counts = self.args.threads, self.args.turns
        return [
            Timing("a step of vLLM", name, round(ms, 3), round(share, 4), *counts)
            for name, ms, share in each
        ]

    def _watch(self) -> tuple[list[Timed], list[Timed]]:
        """Time the programs, and what of the plug-in vLLM calls; of that `forward` is the first."""
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        model = runner.model
        model.steps = {phase: Timed(step) for phase, step in model.steps.items()}
        model.forward, model.compute_logits = Timed(model.forward), Timed(model.compute_logits)
        [[group]] = runner.attn_groups
        builder = group.get_metadata_builder()
        builder.build = Timed(builder.build)
        return [*model.steps.values()], [model.forward, model.compute_logits, builder.build]


def _engine(args: argparse.Namespace, blocks: int, size: int) -> Any:
    """VLLM in this process, with a cache of so many blocks and bytes, and steps like the loop's."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    given = EngineArgs(
        model=str(args.artifact),
        max_model_len=args.length + args.new,
        enforce_eager=True,
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=size,
        max_num_seqs=args.prompts,
        max_num_batched_tokens=args.prompts * args.length,
        enable_prefix_caching=False,
    )
    engine = LLMEngine.from_engine_args(given)
    if (taken := torch.get_num_threads()) != args.threads:
        what = f"is {args.threads} and vLLM takes {taken}, for both"
        raise TargetError("--threads", what, f"set OMP_NUM_THREADS to {args.threads}")
    return engine
