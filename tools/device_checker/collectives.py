"""All-reduce between cards: is the sum right, what does the smallest take, how fast is the largest.

One process a card, as torchrun would have it; they meet by a file. The bound is the cost report's:
what a card must send at least, over all its links at once.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvc8.backends.npu.cost import OpCost, must_send
from kvc8.backends.workload import Device
from kvc8.ir.types import dtype_name
from kvc8.tools.device_checker.comparison import BY_MORE, EQUAL
from kvc8.tools.device_checker.machine import Machine
from kvc8.tools.device_checker.timings import HIDDEN, PROMPT

WARM, TIMED = 3, 10
DTYPES = torch.float16, torch.int32  # --sums half, and int32


@dataclass(frozen=True)
class TimedSum:
    """A sum over cards of one row of the hidden state a token."""

    cards: int
    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What it is called in the report."""
        of = f"{self.tokens:,} tokens" if self.tokens > 1 else "1 token"
        return f"all-reduce, {of} in {dtype_name(self.dtype)}, {self.cards} cards"

    @property
    def bytes(self) -> int:
        """What each card has and gets."""
        return self.tokens * self.width * self.dtype.itemsize

    @property
    def sent(self) -> int:
        """What each card must send."""
        return must_send(self.bytes, self.cards)

    @property
    def bound(self) -> float:
        """The seconds that it takes at least."""
        cost = OpCost(read=self.bytes, written=self.bytes, sent=self.sent)
        return cost.at(Device(), self.cards).seconds


def timed_sums(cards: int, *, small: bool) -> Iterator[TimedSum]:
    """Sums of one token and of a prompt over two cards and over all; none with one card."""
    tokens, width = ((1, 8), 64) if small else ((1, PROMPT), HIDDEN)
    for count in sorted({2, cards}) if cards > 1 else ():
        for dtype in DTYPES:
            yield from (TimedSum(count, each, width, dtype) for each in tokens)


def summed(machine: Machine, each: TimedSum, rank: int, meeting: Path) -> dict[str, Any]:
    """The median time of a sum, on one of the cards."""
    store = dist.FileStore(str(meeting / "store"), each.cards)
    dist.init_process_group(machine.collectives, store=store, rank=rank, world_size=each.cards)
    first = _sum(machine, each, rank, [])
    ranks = each.cards * (each.cards + 1) // 2
    right = torch.equal(first.cpu(), _rows(each) * ranks)
    seconds: list[float] = []
    for _ in range(WARM + TIMED):
        _sum(machine, each, rank, seconds)
    dist.barrier()
    dist.destroy_process_group()
    outcome = EQUAL if right else BY_MORE
    return {"outcome": outcome, "seconds": median(seconds[WARM:])}


def _sum(machine: Machine, each: TimedSum, rank: int, seconds: list[float]) -> Tensor:
    x = (_rows(each) * (rank + 1)).to(machine.device)
    machine.synchronize()
    start = time.perf_counter()
    dist.all_reduce(x)
    machine.synchronize()
    seconds.append(time.perf_counter() - start)
    return x


def _rows(each: TimedSum) -> Tensor:
    """Whole numbers so small that half precision holds their sums over any 8 cards."""
    numbers = torch.arange(each.tokens * each.width) % 31 - 15
    return numbers.to(each.dtype)
