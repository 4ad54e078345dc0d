"""How much memory a run takes, and whether a budget has it."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from kvc8.ir.checkpoint.unmapped import PIECE
from kvc8.ir.errors import ModelError
from kvc8.ir.program import tensor_type
from kvc8.tools.quantizer.layers import LayerCalls

APART = 4 << 20  # bytes from which a block of memory is had from the system, and given back
KEPT = 64 << 20  # free bytes at the end of the other blocks, which are kept to be had again
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def needed(stages: Sequence[LayerCalls], longest: int) -> int:
    """The bytes that the largest layer takes while the longest text runs through it.

    Its weights are there three times: as they were read, smoothed or rounded, and on the way
    between. Of activations twelve of the widest are alive, and of attention's T x T numbers four
    sets of a head each in float32, two of them of all heads.
    """
    return max(_weights(stage) * 3 + _working(stage, longest) for stage in stages) + 2 * PIECE


def _weights(stage: LayerCalls) -> int:
    types = [tensor_type(parameter) for parameter in stage.parameters]
    return sum(t.dtype.itemsize * _count(t.shape) for t in types)


def _count(shape: Sequence[object]) -> int:
    total = 1
    for size in shape:
        total *= int(str(size))
    return total


def _working(stage: LayerCalls, longest: int) -> int:
    types = [tensor_type(parameter) for parameter in stage.parameters]
    widest = max((int(str(size)) for t in types for size in t.shape), default=0)
    heads = [call for call in stage.calls if "paged_attention" in str(call.target)]
    count = max((int(str(tensor_type(h.args[0]).shape[1])) for h in heads), default=0)
    return 12 * 4 * longest * widest + 4 * 4 * count * longest * longest


def resident() -> int:
    """The bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def check_budget(budget: float | None, stages: Sequence[LayerCalls], longest: int) -> None:
    """Raises ModelError where a layer does not fit into what a budget leaves."""
    if budget is None:
        return
    least = resident() + needed(stages, longest)
    if least > budget:
        what = f"{budget / 1e9:.2f} GB is not enough for this model and texts of {longest} tokens"
        raise ModelError("--memory", what, f"give at least {least / (1 << 20):.0f}M")


def keep_large_apart() -> None:
    """Have each large block of this process given back to the system when it is freed.

    Left to itself glibc does so with fewer blocks the larger the ones are that it has seen freed,
    up to 32 MB, and what tensors of many sizes leave behind is in pieces too small to be used. For
    smaller blocks the system would be asked, and clear its pages, thousands of times a layer.
    """
    if change := getattr(ctypes.CDLL(None), "mallopt", None):
        change(M_MMAP_THRESHOLD, APART)
        change(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Give back to the system what is free between the small blocks of memory in use."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
