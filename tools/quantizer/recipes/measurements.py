"""What recipe `kvc8` looks at in a layer: what linears read, and how far K and V reach.

The first texts only widen the reach of K and V; the user's are looked at for all, and the second
half of them is held back: what it loses by the ranges of those before it tells of the margin.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.checkpoint.w8a8 import Range, finite
from kvc8.ir.errors import ModelError
from kvc8.ir.program import argument, is_call
from kvc8.ir.run import Value
from kvc8.tools.quantizer.choices import Reach, Sample, clipped
from kvc8.tools.quantizer.layers import attend_in_float32, plain
from kvc8.tools.quantizer.recipes.mixtures import Experts, Reached
from kvc8.tools.quantizer.sites import Cached
from kvc8.tools.quantizer.transforms.positions import (
    Table,
    Turning,
    find_turning,
    hardly_turned,
    rows_at,
    starts_of,
)
from kvc8.tools.quantizer.work import Layer

PLACES = 32  # of the context where each text is put
SAMPLE = 4  # every so many rows of what a linear reads are kept to choose its range by
MARGIN = 1.1  # at least, on the reach of a cache's channels
STILL_MARGIN = 1.3  # and of those of K that RoPE hardly turns


@dataclass
class Measurements:
    """What was measured of a layer so far."""

    checkpoint: Checkpoint
    mixed: Sequence[Experts]  # to quantize, of the whole model
    widening: int  # the first so many texts only widen the reach of K and V
    positions: int  # tokens of context that K's scales are for
    table: Table  # of what RoPE makes of positions
    layer: Layer
    read: Mapping[Node, Node]  # by linear, what it reads
    quantized: set[Node]
    caches: Sequence[Cached]
    ends: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of each channel
    samples: dict[Node, Sample] = field(default_factory=dict)
    hessians: dict[Node, Tensor] = field(default_factory=dict)
    reaches: dict[Node, Reach] = field(default_factory=dict)
    queries: dict[Node, Tensor] = field(default_factory=dict)  # squared, by rows of K
    floors: dict[Node, Tensor] = field(default_factory=dict)  # of margins, by rows of K
    real: bool = False  # whether the text is one of the user's
    held_back: bool = False

    def __post_init__(self) -> None:
        self.plain = plain(self.checkpoint, attend_in_float32)
        self.turnings = {
            turning.source: (cache.rows, turning)
            for cache in self.caches
            if cache.side == "k" and (turning := find_turning(cache.rows))
        }
        turned = {rows for rows, _ in self.turnings.values()}
        self.rows = {cache.rows for cache in self.caches} - turned
        calls = set(self.layer.stage.calls)
        self.experts = {k.call: Reached(k) for k in self.mixed if k.call in calls}

    def text(self, index: int) -> None:
        """Say which text comes next."""
        real = index - self.widening
        self.real = real >= 0
        self.held_back = real >= (len(self.layer.texts) - self.widening) // 2 > 0

    def observe(self, call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        """Evaluate a call, and look at what it gives."""
        value = self.plain(call, args, kwargs)
        if call in self.experts and self.real:
            self.experts[call].see(args)
        if is_call(call, ops.paged_attention) and self.caches:
            self._attention(call, args[0])
        if not isinstance(value, Tensor):
            return value
        if call in self.read and isinstance(args[0], Tensor):
            self._input(self.read[call], args[0])
        if call in self.rows:
            self._rows(call, [value], len(value))
        if call in self.turnings:
            self._turned(*self.turnings[call], value)
        return value

    def _input(self, call: Node, value: Tensor) -> None:
        flat, measured = value.reshape(-1, value.shape[-1]), self.real and call in self.quantized
        # Along dim 0 torch.aminmax takes ten times as long.
        low, high = (flat.amin(0), flat.amax(0)) if measured else torch.aminmax(flat)
        if not finite(Range(float(low.min()), float(high.max()))):
            what = "gives a value that is not finite"
            where = call.meta.get("origin") or call.name
            raise ModelError(where, what, "check the model's weights")
        if not measured:
            return
        before = self.ends.get(call, (low, high))
        self.ends[call] = (torch.minimum(before[0], low), torch.maximum(before[1], high))
        self.samples.setdefault(call, Sample(SAMPLE)).add(value)
        self.hessians[call] = self.hessians.get(call, 0) + flat.t() @ flat

    def range_of(self, source: Node, s: Tensor | None) -> Range:
        """The range of what linears read, divided by s where that is given."""
        low, high = (end if s is None else end / s for end in self.ends[source])
        sample = self.samples[source].values()
        whole = Range(float(low.min()), float(high.max()))
        return clipped(whole, sample if s is None else sample / s)

    def _turned(self, rows: Node, turning: Turning, output: Tensor) -> None:
        tokens, stored = output.shape[1], self.checkpoint.tensors
        place = partial(
            rows_at,
            turning,
            weights=self.layer.weights,
            read=lambda n: load(stored[n]),
            table=self.table,
        )
        starts = starts_of(tokens, self.positions, PLACES)
        self._rows(rows, place(output, starts), tokens * PLACES)
        if rows not in self.floors:
            ones = torch.ones(1, 1, output.shape[2])
            [ends] = place(ones, (0, self.positions - 1))
            still = hardly_turned(ends.flatten(1))
            self.floors[rows] = torch.where(still, STILL_MARGIN, MARGIN)

    def _rows(self, rows: Node, parts: Iterable[Tensor], count: int) -> None:
        reach = self.reaches.setdefault(rows, Reach())
        top = reach.add((part.flatten(1).float() for part in parts), count, self.held_back)
        if not bool(top.isfinite().all()):
            what = "caches a value that is not finite"
            raise ModelError(f"{rows.meta.get('origin')}", what, "check the model's weights")

    def _attention(self, call: Node, query: Value) -> None:
        assert isinstance(query, Tensor)
        rows = argument(argument(call, 1), 1)
        heads = int(rows.meta["type"].shape[1])
        grouped = query.float().unflatten(1, (heads, -1))  # [T, H, G, D]
        squared = grouped.square().sum((0, 2)).flatten().double()
        self.queries[rows] = self.queries.get(rows, 0) + squared
