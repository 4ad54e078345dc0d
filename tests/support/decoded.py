"""A captured model beside transformers' own: a prompt, then tokens one by one out of the cache."""

from pathlib import Path

import torch
from support.steps import step, values

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.program import Program
from kvc8.ir.run import run
from kvc8.tools.driver.faithful import hold

TOKENS, PROMPT = [5, 17, 42, 99, 3, 64, 80, 23, 11, 71, 9, 100], 9


def decoded(directory: Path) -> float:
    """How far float32 logits are off transformers', of the largest of a token's or of one.

    Raises ModelError where the model is not captured, or in float64 not what transformers computes.
    """
    return off(directory, capture(open_checkpoint(directory), torch.float32))


def off(directory: Path, program: Program) -> float:
    """`decoded` of a program that is captured."""
    found = hold(open_checkpoint(directory), program, TOKENS, steps=len(TOKENS) - PROMPT)
    if found.problem:
        raise found.problem
    made, table = values(program, directory), [[7, 2, 11]]
    logits, *caches = run(program, {**made, **step(TOKENS[:PROMPT], [0], [PROMPT], table)})
    parts = [(logits, found.theirs[:PROMPT])]
    for p in range(PROMPT, len(TOKENS)):
        made |= {cache.name: new for cache, new in zip(program.caches(), caches, strict=True)}
        logits, *caches = run(program, {**made, **step(TOKENS[p : p + 1], [p], [p + 1], table)})
        parts.append((logits, found.theirs[p : p + 1]))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in parts)
