"""What the runtime gives a program of a batch, by name.

    input_ids     i64[T]    tokens                 slot_mapping  i32[T]      slot each row goes to
    positions     i64[T]    in their sequences     logits_rows   i64[R]      rows to give logits of
    block_table   i32[B, M] blocks of a sequence   seq_lens      i32[B]      tokens, new included
    query_starts  i32[B+1]  first row of each      query_ends    ints[B]     row after the last
    kv_lens       ints[T]   as seq_lens            kv_ends       ints[B]     their running sum
    kv_slots      i32[L]    where the rows of all sequences lie, end to end

and for attention in a window of w tokens, where a sequence has one new token:

    window_w_table   i32[T, Mw]            the blocks that its window touches
    window_w_lens    ints[T]               tokens in these, up to the newest
    window_w_hidden  b8[T, 1, 1, Mw * S]   True at those that the window does not reach

Lists stay on the host, where the device's ops want them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor

from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.program import Program
from kvc8.ir.run import Value

CPU = torch.device("cpu")
PACKS = ("query_ends", "query_starts")  # a program with one of these takes several sequences
WINDOW = re.compile(r"window_(\d+)_(table|lens|hidden)")


@dataclass(frozen=True)
class Rows:
    """The new tokens of one sequence: `tokens` go to positions `start`, `start` + 1, ..."""

    tokens: Sequence[int]
    start: int
    table: Sequence[int]  # its blocks, in the order of its tokens

    @property
    def length(self) -> int:
        """Tokens of the sequence, the new ones included."""
        return self.start + len(self.tokens)

    @property
    def phase(self) -> str:
        """The program that takes such rows."""
        if not self.start:
            return "prefill"
        return "chunk" if len(self.tokens) > 1 else "decode"


@dataclass(frozen=True)
class Batch:
    """The rows of one step, and how they lie in the cache."""

    rows: Sequence[Rows]
    block_size: int
    every: bool  # whether the logits of every row are wanted, or of each sequence's last

    @property
    def ends(self) -> list[int]:
        """The row after the last of each sequence."""
        return list(accumulate(len(rows.tokens) for rows in self.rows))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [rows.length for rows in self.rows]

    @property
    def positions(self) -> list[int]:
        """The place of each token in its sequence."""
        return [p for rows in self.rows for p in range(rows.start, rows.length)]

    @property
    def logits_rows(self) -> list[int]:
        """The rows to give logits of."""
        ends = self.ends
        return list(range(ends[-1])) if self.every else [end - 1 for end in ends]

    def slots(self, whole: bool) -> list[int]:
        """The flat slots of the new tokens, or of the whole sequences."""
        return [
            self._slot(rows, p)
            for rows in self.rows
            for p in range(0 if whole else rows.start, rows.length)
        ]

    def _slot(self, rows: Rows, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        if block >= len(rows.table):
            raise TargetError(
                f"position {position}",
                f"lies outside the {len(rows.table)} blocks of its sequence",
                "give the sequence more blocks",
            )
        return rows.table[block] * self.block_size + offset

    @property
    def tables(self) -> list[list[int]]:
        """The blocks of each sequence, as many for each."""
        width = max(len(rows.table) for rows in self.rows)
        return [[*rows.table, *[0] * (width - len(rows.table))] for rows in self.rows]

    def first_block(self, rows: Rows, window: int) -> int:
        """The first block that the newest token of a sequence sees in a window."""
        return max(0, rows.length - window) // self.block_size

    def window_table(self, window: int) -> list[list[int]]:
        """The blocks from there on; as many as a window can touch, whatever the lengths."""
        width = (window + self.block_size - 2) // self.block_size + 1
        found = []
        for rows in self.rows:
            end = -(-rows.length // self.block_size)
            seen = list(rows.table[self.first_block(rows, window) : end])
            found.append([*seen, *[0] * (width - len(seen))])
        return found

    def window_lens(self, window: int) -> list[int]:
        """Tokens in those blocks."""
        return [
            rows.length - self.first_block(rows, window) * self.block_size for rows in self.rows
        ]

    def window_hidden(self, window: int) -> Tensor:
        """True at the tokens of those blocks that lie before the window, [T, 1, 1, slots]."""
        slots = len(self.window_table(window)[0]) * self.block_size
        before = [max(0, length - window) for length in self.window_lens(window)]
        return (torch.arange(slots) < torch.tensor(before)[:, None])[:, None, None]


I64, I32 = torch.int64, torch.int32
MAKERS: Mapping[str, Callable[[Batch], Value]] = MappingProxyType(
    {
        "input_ids": lambda b: torch.tensor([t for r in b.rows for t in r.tokens], dtype=I64),
        "positions": lambda b: torch.tensor(b.positions, dtype=I64),
        "logits_rows": lambda b: torch.tensor(b.logits_rows, dtype=I64),
        "slot_mapping": lambda b: torch.tensor(b.slots(whole=False), dtype=I32),
        "kv_slots": lambda b: torch.tensor(b.slots(whole=True), dtype=I32),
        "block_table": lambda b: torch.tensor(b.tables, dtype=I32),
        "seq_lens": lambda b: torch.tensor(b.lengths, dtype=I32),
        "query_starts": lambda b: torch.tensor([0, *b.ends], dtype=I32),
        "query_ends": lambda b: b.ends,
        "kv_lens": lambda b: b.lengths,
        "kv_ends": lambda b: list(accumulate(b.lengths)),
    }
)
KNOWN = tuple(MAKERS)


def inputs(
    rows: Sequence[Rows],
    block_size: int,
    device: torch.device,
    every: bool = False,
    names: Sequence[str] = KNOWN,
) -> dict[str, Value]:
    """The inputs of those names, for a batch. See the module."""
    batch = Batch(rows, block_size, every)
    found = {name: _maker(name)(batch) for name in names}
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in found.items()}


def _maker(name: str) -> Callable[[Batch], Value]:
    found = WINDOW.fullmatch(name)
    if found is None:
        return MAKERS[name]
    window = int(found[1])
    of_window: dict[str, Callable[[Batch], Value]] = {
        "table": lambda b: torch.tensor(b.window_table(window), dtype=I32),
        "lens": lambda b: b.window_lens(window),
        "hidden": lambda b: b.window_hidden(window),
    }
    return of_window[found[2]]


def check_inputs(program: Program) -> None:
    """Raise IRError for an input of a program that is none of the module's."""
    for node in program.inputs():
        if node.name not in KNOWN and not WINDOW.fullmatch(node.name):
            known = ", ".join(sorted(KNOWN))
            raise IRError(node.name, "is no input that the runtime gives", f"use {known}")
