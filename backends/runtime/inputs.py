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

Lists stay on the host, where the device's ops want them; tensors are made on the device that the
batch lies on, of tensors, and nothing is read back from it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


def phase_of(count: int, length: int) -> str:
    """The program for a sequence of `length` tokens, `count` of which are new."""
    if count == length:
        return "prefill"
    return "chunk" if count > 1 else "decode"


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
        return phase_of(len(self.tokens), self.length)


@dataclass(frozen=True)
class Batch:
    """The rows of one step, sequence after sequence, and how they lie in the cache."""

    tokens: Tensor  # i64[T]
    positions: Tensor  # i64[T], the place of each token in its sequence
    slots: Tensor  # i32[T], flat
    tables: Tensor  # i32[B, M], the blocks of each sequence
    counts: Sequence[int]  # rows of each sequence
    lengths: Sequence[int]  # tokens of each sequence, the new ones included
    block_size: int
    every: bool = False  # whether the logits of every row are wanted, or of each sequence's last

    @property
    def ends(self) -> list[int]:
        """The row after the last of each sequence."""
        return list(accumulate(self.counts))

    @property
    def logits_rows(self) -> list[int]:
        """The rows to give logits of."""
        ends = self.ends
        return list(range(ends[-1])) if self.every else [end - 1 for end in ends]

    def tensor(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Whole numbers on the device of the batch."""
        return torch.tensor(values, dtype=dtype).to(self.tables.device)

    def take(self, first: int, last: int) -> "Batch":
        """The sequences from `first` to before `last`; tensors are parts of the batch's."""
        starts = [0, *self.ends]
        rows = slice(starts[first], starts[last])
        lengths = self.lengths[first:last]
        width = -(-max(lengths) // self.block_size)
        return replace(
            self,
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            tables=self.tables[first:last, :width].contiguous(),
            counts=self.counts[first:last],
            lengths=lengths,
        )

    @property
    def all_slots(self) -> Tensor:
        """The flat slots of all tokens of the sequences, end to end: i32[L]."""
        total, first = sum(self.lengths), [0, *accumulate(self.lengths)][:-1]
        lengths, starts = self.tensor(self.lengths, I64), self.tensor(first, I64)
        whose = torch.arange(len(first), device=lengths.device)
        whose = whose.repeat_interleave(lengths, output_size=total)
        places = torch.arange(total, device=whose.device) - starts[whose]
        return slots_at(self.tables, whose, places, self.block_size)

    def first_blocks(self, window: int) -> list[int]:
        """The first block that the newest token of each sequence sees in a window."""
        return [max(0, length - window) // self.block_size for length in self.lengths]

    def window_table(self, window: int) -> Tensor:
        """The blocks from there on; as many as a window can touch, whatever the lengths."""
        width = (window + self.block_size - 2) // self.block_size + 1
        ends = [-(-length // self.block_size) for length in self.lengths]
        at = self.tensor(self.first_blocks(window), I64)[:, None]
        at = at + torch.arange(width, device=at.device)
        known = at < self.tensor(ends, I64)[:, None]
        blocks = self.tables.gather(1, at.clamp(max=self.tables.shape[1] - 1))
        return blocks.masked_fill(~known, 0)

    def window_lens(self, window: int) -> list[int]:
        """Tokens in those blocks."""
        pairs = zip(self.lengths, self.first_blocks(window), strict=True)
        return [length - first * self.block_size for length, first in pairs]

    def window_hidden(self, window: int) -> Tensor:
        """True at the tokens of those blocks that lie before the window, [T, 1, 1, slots]."""
        slots = ((window + self.block_size - 2) // self.block_size + 1) * self.block_size
        before = self.tensor([max(0, n - window) for n in self.window_lens(window)], I64)
        return (torch.arange(slots, device=before.device) < before[:, None])[:, None, None]


I64, I32 = torch.int64, torch.int32
MAKERS: Mapping[str, Callable[[Batch], Value]] = MappingProxyType(
    {
        "input_ids": lambda b: b.tokens,
        "positions": lambda b: b.positions,
        "logits_rows": lambda b: b.tensor(b.logits_rows, I64),
        "slot_mapping": lambda b: b.slots,
        "kv_slots": lambda b: b.all_slots,
        "block_table": lambda b: b.tables,
        "seq_lens": lambda b: b.tensor(b.lengths, I32),
        "query_starts": lambda b: b.tensor([0, *b.ends], I32),
        "query_ends": lambda b: b.ends,
        "kv_lens": lambda b: list(b.lengths),
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
    """The inputs of those names, for rows of sequences. See the module."""
    return inputs_of(batch_of(rows, block_size, device, every), names)


def inputs_of(batch: Batch, names: Sequence[str] = KNOWN) -> dict[str, Value]:
    """The inputs of those names, for a batch. See the module."""
    return {name: _maker(name)(batch) for name in names}


def batch_of(
    rows: Sequence[Rows], block_size: int, device: torch.device, every: bool = False
) -> Batch:
    """Put rows on a device. Raises TargetError for one that lies in no block of its sequence."""
    for each in rows:
        _check_table(each, block_size)
    width = max(len(each.table) for each in rows)
    places = [(i, p) for i, each in enumerate(rows) for p in range(each.start, each.length)]
    tables = torch.tensor([[*r.table, *[0] * (width - len(r.table))] for r in rows], dtype=I32)
    whose, positions = torch.tensor(places, dtype=I64).unbind(1)
    return Batch(
        tokens=torch.tensor([t for each in rows for t in each.tokens], dtype=I64).to(device),
        positions=positions.contiguous().to(device),
        slots=slots_at(tables, whose, positions, block_size).to(device),
        tables=tables.to(device),
        counts=[len(each.tokens) for each in rows],
        lengths=[each.length for each in rows],
        block_size=block_size,
        every=every,
    )


def _check_table(rows: Rows, block_size: int) -> None:
    outside = max(rows.start, len(rows.table) * block_size)
    if outside < rows.length:
        what = f"lies outside the {len(rows.table)} blocks of its sequence"
        raise TargetError(f"position {outside}", what, "give the sequence more blocks")


def slots_at(tables: Tensor, whose: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The flat slots of positions [n], each in the sequence that `whose` [n] says: i32[n]."""
    blocks = tables[whose, positions // block_size]
    return (blocks * block_size + positions % block_size).to(I32)


def _maker(name: str) -> Callable[[Batch], Value]:
    found = WINDOW.fullmatch(name)
    if found is None:
        return MAKERS[name]
    window = int(found[1])
    of_window: dict[str, Callable[[Batch], Value]] = {
        "table": lambda b: b.window_table(window),
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
