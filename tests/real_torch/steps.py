"""What both sides of the check run: a prompt, a chunk, and tokens one by one.

The float64 program is greedy, so its tokens are compared. The artifact, in float16, takes those
tokens, and its logits are compared.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.model import Model, load
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.program import Program

PHASES = ("prefill", "chunk", "decode")
NAMES = ("llama_fp16_m3", "qwen2_fp16_none_asym")  # zero points of the cache in the second
PROMPT, FIRST, NEW, BLOCKS, BLOCK = [(7 * i + 3) % 500 for i in range(20)], 9, 12, 4, 128


def artifact(path: Path) -> Model:
    """An artifact, loaded."""
    found = read(path)
    return load(found.programs, found.make, blocks=BLOCKS, block_size=found.block_size)


def exact(program: Program, checkpoint: Path) -> Model:
    """A QUANTIZED program in float64, loaded."""
    read_one = partial(make, read=open_checkpoint(checkpoint).read)
    return load(dict.fromkeys(PHASES, program), read_one, blocks=BLOCKS, block_size=BLOCK)


def logits(model: Model, given: Sequence[int] = ()) -> tuple[list[int], Tensor]:
    """The tokens after the prompt, those given or the likeliest, and the logits before each."""
    table, rows, tokens = [0, 1], [], list[int]()
    rows.append(model.prefill([PROMPT[:FIRST]], [table]))
    rows.append(model.chunk([Rows(PROMPT[FIRST:], FIRST, table)]))
    for i in range(NEW):
        tokens.append(given[i] if given else int(rows[-1].argmax()))
        rows.append(model.decode([tokens[-1]], [len(PROMPT) + i + 1], [table]))
    return tokens, torch.cat(rows).double()
