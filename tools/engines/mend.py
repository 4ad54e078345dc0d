"""KV scales that an engine can use as they are, from those that a checkpoint holds.

An engine quantizes K after RoPE by the scale it is given, and takes no zero point off. So scales
measured before RoPE become the bounds of passes/repair_rope_scales.py, which is run here to make
them, and a scale with a zero point becomes the least symmetric one that holds the same range:
s * max(|-128 - z|, |127 - z|) / 127, rounded up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.expression import STEPS, furthest, make, stored_names
from kvc8.ir.program import argument, expression_of, is_cache
from kvc8.passes.repair_rope_scales import repair_rope_scales
from kvc8.passes.rewrite import Remark


@dataclass(frozen=True)
class Mended:
    """New KV scales by stored name, float32 [kv_heads * head_dim], and what was done."""

    scales: Mapping[str, Tensor]
    widened: int  # layers whose K was measured before RoPE
    symmetric: int  # caches that had zero points


def mend(checkpoint: Checkpoint, dtype: torch.dtype) -> Mended:
    """Make the KV scales of a checkpoint ones that hold for engines, for storage in `dtype`.

    Raises IRError where K was measured before RoPE and a norm lies between.
    """
    bounds = _bounds(checkpoint) if checkpoint.kv_calibrated == "pre-rope" else {}
    scales, symmetric = dict(bounds), 0
    for pair in checkpoint.kv.values():
        for cache in pair:
            zero = checkpoint.read(cache.offset).float() if cache.offset else torch.zeros(1)
            symmetric += bool(zero.any())
            if bool(zero.any()) and cache.scale not in bounds:
                reach = checkpoint.read(cache.scale).float() * furthest(zero) / 127
                scales[cache.scale] = STEPS["round_up"](reach, dtype)
    return Mended(scales, len(bounds), symmetric)


def _bounds(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """K scales that hold after RoPE, by the name of the stored scale."""
    program = capture(checkpoint)
    _told: list[Remark] = list(repair_rope_scales(program))
    found: dict[str, Tensor] = {}
    for write in program.calls(ops.cache_write):
        cache = argument(write, 0)
        if not is_cache(cache) or expression_of(cache).args[2:] != ("repaired",):
            continue
        scale = expression_of(cache).args[0]
        names = {k.scale for k, _ in checkpoint.kv.values()}
        [name] = names & set(stored_names(scale))  # type: ignore[arg-type]
        found[name] = make(scale, checkpoint.read).flatten()  # type: ignore[arg-type]
    return found
