"""Inputs for running a program: parameters, empty caches, and the tokens of a step."""

from pathlib import Path

import torch

from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.program import Program
from kvc8.ir.types import size

BLOCK = 4


def values(
    program: Program, directory: Path, blocks: int = 16, block: int = BLOCK
) -> dict[str, torch.Tensor]:
    """The parameters of a program, and caches of zeros."""
    checkpoint = open_checkpoint(directory)
    made = {n.name: make(n.meta["expression"], checkpoint.read) for n in program.parameters()}
    for cache in program.caches():
        shape = cache.meta["type"].shape
        sizes = {size("N"): blocks, size("S"): block}
        made[cache.name] = torch.zeros(
            [sizes.get(d, d) for d in shape], dtype=cache.meta["type"].dtype
        )
    return made


def step(tokens, starts, lengths, tables, rows=None, block=BLOCK):
    """The inputs of a step: for each sequence its new tokens, from `starts` to `lengths`."""
    positions = [p for a, b in zip(starts, lengths, strict=True) for p in range(a, b)]
    seq = [i for i, (a, b) in enumerate(zip(starts, lengths, strict=True)) for _ in range(a, b)]
    slots = [tables[i][p // block] * block + p % block for i, p in zip(seq, positions, strict=True)]
    new = torch.tensor([b - a for a, b in zip(starts, lengths, strict=True)])
    i32 = torch.int32
    return {
        "input_ids": torch.tensor(tokens),
        "positions": torch.tensor(positions),
        "slot_mapping": torch.tensor(slots, dtype=i32),
        "block_table": torch.tensor(tables, dtype=i32),
        "seq_lens": torch.tensor(lengths, dtype=i32),
        "query_starts": torch.cat([torch.zeros(1), new.cumsum(0)]).to(i32),
        "logits_rows": torch.arange(len(tokens)) if rows is None else torch.tensor(rows),
    }
