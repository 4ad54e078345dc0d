"""How much memory a run takes, and what is left of a budget for activations."""

from collections.abc import Sequence
from pathlib import Path

from kvc8.ir.checkpoint.unmapped import PIECE
from kvc8.ir.errors import ModelError
from kvc8.ir.program import tensor_type
from kvc8.tools.quantizer.layers import LayerCalls


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


def room(budget: float | None, stages: Sequence[LayerCalls], longest: int) -> float:
    """What a budget leaves for activations. Raises ModelError where a layer does not fit."""
    if budget is None:
        return float("inf")
    least = resident() + needed(stages, longest)
    if least > budget:
        what = f"{budget / 1e9:.2f} GB is not enough for this model and texts of {longest} tokens"
        raise ModelError("--memory", what, f"give at least {least / (1 << 20):.0f}M")
    return budget - least
