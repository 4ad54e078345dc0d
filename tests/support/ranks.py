"""What the tests of divided models share: a run through every kind of batch, and joined caches."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.model import load
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.program import Program

Programs = Program | Mapping[str, Program]  # one for every phase, or one for each
BLOCK = 32
PHASES = ("prefill", "chunk", "decode")
A = [5, 9, 17, 33, 65, 12, 101, 7, 44, 3, 25, 18, 90]  # past a window of 8
B, C = [77, 21, 60], [14, 2, 99, 31]
TABLES = [[3, 1], [0, 2], [5, 4]]


def session(programs: Programs, directory: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits and caches of prompts, a chunk, decode steps, and a batch of all three."""
    read = open_checkpoint(directory).read
    phases = dict.fromkeys(PHASES, programs) if isinstance(programs, Program) else programs
    model = load(phases, lambda x: make(x, read), blocks=6, block_size=BLOCK)
    logits = [model.prefill([A[:6], B], TABLES[:2])]
    logits.append(model.chunk([Rows(A[6:9], 6, TABLES[0])]))
    logits.append(model.decode([A[9], 8], [10, 4], TABLES[:2]))
    mixed = [Rows(A[10:], 10, TABLES[0]), Rows([42], 4, TABLES[1]), Rows(C, 0, TABLES[2])]
    logits.append(model.mixed(mixed))
    return logits, dict(model.caches)


def joined(caches: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The caches of all ranks as one has them whole; ranks with the same heads must agree."""
    found = {}
    for name, whole in like.items():
        ranks = [cache for key, cache in caches.items() if key.partition("_rank")[0] == name]
        copies = len(ranks) * ranks[0].shape[2] // whole.shape[2]
        for i, cache in enumerate(ranks):
            assert torch.equal(cache, ranks[i - i % copies])
        found[name] = torch.cat(ranks[::copies], 2)
    return found


def differing(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> int:
    """How many codes differ."""
    return sum(int((joined(got, want)[name] != cache).sum()) for name, cache in want.items())
