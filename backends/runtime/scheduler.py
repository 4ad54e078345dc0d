"""Which sequences run: they wait until the cache has room, run together, and free their blocks.

A sequence takes at once the blocks for its prompt and all it may yet generate, so that one that
runs never has to stop. Admission is in order: a long prompt is not passed by shorter ones.

With `share`, a prompt that begins as that of a sequence that runs takes over its whole blocks of
that beginning, once they are written. One whose beginning is just being written waits for it.
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from kvc8.backends.runtime.blocks import Blocks
from kvc8.ir.errors import TargetError


@dataclass
class Sequence:
    """A prompt and what was generated for it."""

    index: int  # its place among the prompts
    prompt: Many[int]
    limit: int  # the most tokens to generate
    generated: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    finish: str = ""  # "stop" or "length" once it has ended
    cached: int = 0  # tokens of the prompt that the cache holds
    found: int = 0  # as many of them were there before

    @property
    def length(self) -> int:
        """Tokens, generated ones included."""
        return len(self.prompt) + len(self.generated)

    @property
    def most_cached(self) -> int:
        """Tokens the cache may come to hold; the last one generated is never written."""
        return len(self.prompt) + self.limit - 1

    @property
    def prefilled(self) -> bool:
        """Whether the cache holds all of the prompt."""
        return self.cached == len(self.prompt)


class Scheduler:
    """Sequences that wait and sequences that run."""

    def __init__(
        self, blocks: Blocks, stops: frozenset[int] = frozenset(), share: bool = False
    ) -> None:
        self.blocks, self.stops, self.share = blocks, stops, share
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, prompt: Many[int], limit: int) -> Sequence:
        """Let a prompt wait. Raises TargetError for one that is empty or can never fit."""
        sequence = Sequence(len(self.waiting) + len(self.running), tuple(prompt), limit)
        where = f"prompt {sequence.index + 1}"
        if not prompt or limit < 1:
            raise TargetError(where, "has no tokens, or none to generate", "give at least one")
        needed = self.blocks.needed(sequence.most_cached)
        if needed > self.blocks.count:
            tokens = f"{len(prompt)} tokens and {limit} to generate take {needed} blocks"
            what = f"{tokens} of {self.blocks.block_size} and the cache has {self.blocks.count}"
            raise TargetError(where, what, f"allow {needed} blocks or generate fewer tokens")
        self.waiting.append(sequence)
        return sequence

    def admit(self) -> list[Sequence]:
        """Start the sequences that the cache has room for; they need a prefill."""
        admitted = []
        while self.waiting:
            sequence = self.waiting[0]
            common, owner = self._beginning(sequence)
            needed = self.blocks.needed(sequence.most_cached)
            if needed - len(common) > self.blocks.free or (owner and self._writes(owner, common)):
                break
            self.blocks.share(common)
            sequence.blocks = [*common, *self.blocks.take(needed - len(common))]
            sequence.found = sequence.cached = len(common) * self.blocks.block_size
            admitted.append(self.waiting.popleft())
            self.running.append(sequence)
        return admitted

    def _beginning(self, sequence: Sequence) -> tuple[list[int], Sequence | None]:
        """The whole blocks that a prompt has in common with one that runs, and that one.

        One token at least is left over, for its logits are wanted.
        """
        best, owner, size = 0, None, self.blocks.block_size
        for other in self.running if self.share else ():
            same = _same(sequence.prompt[:-1], other.prompt) // size
            if same > best:
                best, owner = same, other
        return owner.blocks[:best] if owner else [], owner

    def _writes(self, owner: Sequence, common: list[int]) -> bool:
        """Whether blocks of a sequence are not all written yet."""
        return owner.cached < len(common) * self.blocks.block_size

    def record(self, sequence: Sequence, token: int) -> None:
        """Add a token to a sequence, which may end by it and then frees its blocks."""
        sequence.generated.append(token)
        if token in self.stops:
            sequence.finish = "stop"
        elif len(sequence.generated) == sequence.limit:
            sequence.finish = "length"
        if sequence.finish:
            self.blocks.give_back(sequence.blocks)
            sequence.blocks = []
            self.running.remove(sequence)


def _same(a: Many[int], b: Many[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
