"""Generate text with a loaded model: prefill what fits, decode what runs, until all have ended."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from torch import Tensor

from kvc8.backends.npu.blocks import Blocks
from kvc8.backends.npu.kv_layout import KVLayout
from kvc8.backends.npu.sampling import Sampling, choose
from kvc8.backends.npu.scheduler import Scheduler
from kvc8.backends.npu.scheduler import Sequence as Running

OnToken = Callable[[Running, int], None]


class Model(Protocol):
    """What runs the steps: runtime.Model, or the Model of kvc8.backends.onnx."""

    layout: KVLayout
    block_size: int

    @property
    def caches(self) -> Mapping[str, Tensor]:
        """The caches by name, each [blocks, ...]."""

    def prefill(self, prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]) -> Tensor:
        """Take fresh prompts into the blocks of `tables`; logits [B, vocabulary]."""

    def decode(
        self, tokens: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Take one token of each sequence, of so many tokens with it; logits [B, vocabulary]."""


@dataclass
class Statistics:
    """What a run cost."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cache_bytes_allocated: int = 0
    cache_bytes_used: int = 0  # at most, in whole blocks
    bytes_per_token: int = 0
    float16_bytes_per_token: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second, all sequences together, without the first of each."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation:
    """The sequences of a run, in the order of the prompts, and what it cost."""

    sequences: list[Running]
    statistics: Statistics = field(default_factory=Statistics)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    stops: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
) -> Generation:
    """Continue prompts, each by up to `most` tokens or to a token of `stops`.

    `on_token` sees each token as it comes. The model's caches are taken over: what they held is
    written over. Raises TargetError for a prompt that the cache could not hold alone.
    """
    return _Run(model, prompts, most, stops, sampling or Sampling(), on_token).run()


class _Run:
    """One call of `generate`."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        most: int,
        stops: frozenset[int],
        sampling: Sampling,
        on_token: OnToken | None,
    ) -> None:
        count = next(iter(model.caches.values())).shape[0]
        self.model, self.sampling, self.on_token = model, sampling, on_token
        self.scheduler = Scheduler(Blocks(count, model.block_size), stops)
        self.result = Generation([self.scheduler.add(prompt, most) for prompt in prompts])
        self.random = [sampling.generator(i) for i in range(len(prompts))]

    def run(self) -> Generation:
        while self.scheduler.waiting or self.scheduler.running:
            if admitted := self.scheduler.admit():
                self.prefill(admitted)
            if self.scheduler.running:
                self.decode(list(self.scheduler.running))
        self.measure()
        return self.result

    def prefill(self, sequences: list[Running]) -> None:
        start = perf_counter()
        logits = self.model.prefill([s.prompt for s in sequences], [s.blocks for s in sequences])
        statistics = self.result.statistics
        statistics.prefill_seconds += perf_counter() - start
        statistics.prefill_tokens += sum(len(s.prompt) for s in sequences)
        self.choose(sequences, logits)

    def decode(self, sequences: list[Running]) -> None:
        start = perf_counter()
        logits = self.model.decode(
            [s.generated[-1] for s in sequences],
            [s.length for s in sequences],
            [s.blocks for s in sequences],
        )
        statistics = self.result.statistics
        statistics.decode_seconds += perf_counter() - start
        statistics.decode_tokens += len(sequences)
        self.choose(sequences, logits)

    def choose(self, sequences: list[Running], logits: Tensor) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            token = choose(row, self.sampling, self.random[sequence.index])
            self.scheduler.record(sequence, token)
            if self.on_token:
                self.on_token(sequence, token)

    def measure(self) -> None:
        statistics, layout = self.result.statistics, self.model.layout
        caches = self.model.caches.values()
        statistics.cache_bytes_allocated = sum(cache.nbytes for cache in caches)
        tokens = self.scheduler.blocks.most_used * self.model.block_size
        statistics.cache_bytes_used = tokens * layout.bytes_per_token
        statistics.bytes_per_token = layout.bytes_per_token
        statistics.float16_bytes_per_token = layout.float16_bytes_per_token
