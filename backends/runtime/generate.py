"""Generate text with a loaded model: prefill what fits, decode what runs, until all have ended."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from torch import Tensor

from kvc8.backends.runtime.blocks import Blocks
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.kv_layout import KVLayout
from kvc8.backends.runtime.sampling import Sampling, choose
from kvc8.backends.runtime.scheduler import Scheduler
from kvc8.backends.runtime.scheduler import Sequence as Running

OnToken = Callable[[Running, int], None]
Agree = Callable[[Sequence[int]], Sequence[int]]


class StepModel(Protocol):
    """What runs the steps: runtime.model.Model, or backends.onnx.model.OnnxModel."""

    layout: KVLayout
    block_size: int

    @property
    def caches(self) -> Mapping[str, Tensor]:
        """The caches by name, each [blocks, ...]."""

    def mixed(self, batch: Sequence[Rows]) -> Tensor:
        """Take the next tokens of sequences, of any kind; logits [B, vocabulary]."""

    def decode(
        self, tokens: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Take one token of each sequence, of so many tokens with it; logits [B, vocabulary]."""


@dataclass
class Statistics:
    """What a run cost."""

    prefill_tokens: int = 0
    found_tokens: int = 0  # of prompts, in blocks that another sequence had written
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
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    stops: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
    chunk: int | None = None,
    share: bool = False,
    agree: Agree | None = None,
) -> Generation:
    """Continue prompts, each by up to `most` tokens or to a token of `stops`.

    Prompts are taken `chunk` tokens at a time, or whole; with `share` those that begin alike share
    the blocks of that beginning. `on_token` sees each token as it comes. Ranks that run one model
    `agree` on tokens: those of the first rank go on. The model's caches are
    taken over: what they held is written over. Raises TargetError for a prompt that the cache could
    not hold alone.
    """
    count = next(iter(model.caches.values())).shape[0]
    scheduler = Scheduler(Blocks(count, model.block_size), stops, share)
    result = Generation([scheduler.add(prompt, most) for prompt in prompts])
    return _Run(model, scheduler, result, sampling or Sampling(), on_token, chunk, agree).run()


@dataclass
class _Run:
    """One call of `generate`."""

    model: StepModel
    scheduler: Scheduler
    result: Generation
    sampling: Sampling
    on_token: OnToken | None
    chunk: int | None
    agree: Agree | None

    def __post_init__(self) -> None:
        self.random = [self.sampling.generator(i) for i in range(len(self.result.sequences))]

    def run(self) -> Generation:
        while self.scheduler.waiting or self.scheduler.running:
            self.result.statistics.found_tokens += sum(s.found for s in self.scheduler.admit())
            if unread := [s for s in self.scheduler.running if not s.prefilled]:
                self.prefill(unread)
            if ready := [s for s in self.scheduler.running if s.prefilled]:
                self.decode(ready)
        self.measure()
        return self.result

    def prefill(self, sequences: list[Running]) -> None:
        """Take the next tokens of prompts, and choose a token after those that end."""
        start = perf_counter()
        batch = [Rows(s.prompt[s.cached :][: self.chunk], s.cached, s.blocks) for s in sequences]
        logits = self.model.mixed(batch)
        statistics = self.result.statistics
        statistics.prefill_seconds += perf_counter() - start
        statistics.prefill_tokens += sum(len(rows.tokens) for rows in batch)
        for sequence, rows in zip(sequences, batch, strict=True):
            sequence.cached = rows.length
        whole = [i for i, sequence in enumerate(sequences) if sequence.prefilled]
        self.choose([sequences[i] for i in whole], logits[whole])

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
        tokens = [
            choose(row, self.sampling, self.random[sequence.index])
            for sequence, row in zip(sequences, logits, strict=True)
        ]
        for sequence, token in zip(
            sequences, self.agree(tokens) if self.agree else tokens, strict=True
        ):
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
