"""What a W8A8 directory loses, by parts, and with ranges of the judged text itself.

A program captured of the directory has its int8 weights, turned back to float. Of it are rounded,
as the directory's scales have it or in other ways, what its int8 linears read, and the cache:

    w       weights alone
    wc      and the cache, by the directory's scales
    wa      and what linears read, by the directory's scales
    wac     all, by the directory's scales
              by range      both by the text's own ranges, nothing clipped
              least error   the same, linears' ranges clipped where the squared error is least
              by token      what linears read by each token's largest value, the cache as stored
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.layouts import KVScale
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.checkpoint.w8a8 import Range, input_params
from kvc8.ir.expression import Expression, stored_names
from kvc8.ir.program import Program, argument, expression_of
from kvc8.tools.benchmarks.floor import (
    CacheProbe,
    JudgedCache,
    minmax,
    reach,
    runner,
    symmetric,
    told,
)
from kvc8.tools.benchmarks.rows import CacheLoss
from kvc8.tools.evaluator.divergence import Figures
from kvc8.tools.evaluator.windows import windows_of
from kvc8.tools.quantizer.choices import Sample, clipped
from kvc8.tools.quantizer.sites import LINEAR

EVERY = 8  # so many rows of what linears read choose where a range is clipped
Given = Callable[["JudgedInput", Tensor], Tensor]  # what is read [..., C] to what int8 makes of it


@dataclass
class JudgedInput:
    """What linears of the judged text read, and the scale and offset [1] that they store."""

    stored: tuple[Tensor, Tensor]
    range: Range = field(default_factory=lambda: Range(0.0, 0.0))
    sample: Sample = field(default_factory=lambda: Sample(EVERY))


def see(read: JudgedInput, x: Tensor) -> Tensor:
    """First pass: the range of what is read; it stays as it is."""
    low, high = (float(end) for end in torch.aminmax(x))
    read.range = Range(min(read.range.low, low), max(read.range.high, high))
    read.sample.add(x)
    return x


def rounded(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Values through int8."""
    return (torch.round(x / scale + offset).clamp(-128, 127) - offset) * scale


def as_float(_: JudgedInput, x: Tensor) -> Tensor:
    """Not rounded."""
    return x


def as_made(read: JudgedInput, x: Tensor) -> Tensor:
    """By what the directory stores."""
    return rounded(x, *read.stored)


def by_range(read: JudgedInput, x: Tensor) -> Tensor:
    """By the least and the largest value of the text."""
    return rounded(x, *input_params(read.range, torch.float32))


def least_error(read: JudgedInput, x: Tensor) -> Tensor:
    """By that range, clipped as the recipe clips that of its own texts."""
    return rounded(x, *input_params(clipped(read.range, read.sample.values()), torch.float32))


def by_token(_: JudgedInput, x: Tensor) -> Tensor:
    """Each token by its largest value."""
    return symmetric(x, x.abs().amax(-1, keepdim=True))


@dataclass
class InputProbe:
    """What each int8 linear of a program reads, by the name of the value that it reads."""

    form: Given = see
    inputs: dict[str, JudgedInput] = field(default_factory=dict)

    def put(self, program: Program, checkpoint: Checkpoint) -> None:
        """Let the program's int8 linears read what the form makes of their input."""
        for call in program.calls(LINEAR):
            for module in {n.rpartition(".")[0] for n in stored_names(_weight(call))}:
                if module in checkpoint.inputs:
                    scale, offset = (checkpoint.read(n).float() for n in checkpoint.inputs[module])
                    source = argument(call, 0).name
                    read = self.inputs.setdefault(source, JudgedInput((scale, offset)))
                    call.target = partial(self._linear, read)

    def _linear(self, read: JudgedInput, x: Tensor, *weights: Tensor) -> Tensor:
        found: Tensor = LINEAR(self.form(read, x), *weights)
        return found


def _weight(call: Node) -> Expression:
    return expression_of(argument(call, 1))


def stored_cache(checkpoint: Checkpoint) -> Callable[[JudgedCache, Tensor], Tensor]:
    """Rows [T, H, D] as the directory's scales give them back; as they are without C8."""
    scales = {
        f"{side}_cache_{layer}": (checkpoint.read(kv.scale).float(), _offset(checkpoint, kv))
        for layer, pair in checkpoint.kv.items()
        for side, kv in zip("kv", pair, strict=True)
    }

    def through(cache: JudgedCache, rows: Tensor) -> Tensor:
        if cache.name not in scales:
            return rows
        return rounded(rows.flatten(1), *scales[cache.name]).view_as(rows)

    return through


def _offset(checkpoint: Checkpoint, kv: KVScale) -> Tensor:
    return torch.zeros(1) if kv.offset is None else checkpoint.read(kv.offset).float()


@torch.no_grad()
def rows(args: argparse.Namespace) -> list[CacheLoss]:
    """One row a part and a form."""
    texts = windows_of(args.text, args.model, args.windows, args.window)
    checkpoint, floats = open_checkpoint(args.w8a8), open_checkpoint(args.model)
    program, caches, inputs = capture(checkpoint, torch.float32), CacheProbe(), InputProbe()
    caches.put(program)
    inputs.put(program, checkpoint)
    logits = runner(program, checkpoint, args.window)
    reference = runner(capture(floats, torch.float32), floats, args.window)
    for text in texts:
        logits(text)
    stored, alone = stored_cache(checkpoint), Figures()
    forms: Mapping[tuple[str, str], tuple[Given, str, Callable[..., Tensor]]] = {
        ("as made", "w"): (as_float, "", reach),
        ("as made", "wc"): (as_float, "kv", stored),
        ("as made", "wa"): (as_made, "", reach),
        ("as made", "wac"): (as_made, "kv", stored),
        ("by range", "wac"): (by_range, "kv", minmax),
        ("least error", "wac"): (least_error, "kv", minmax),
        ("by token", "wac"): (by_token, "kv", stored),
    }
    figures = {case: Figures() for case in forms}
    for text in texts:
        tokens, wanted = torch.tensor(text), reference(text)
        alone.add_alone(wanted, tokens)
        for case, (inputs.form, caches.sides, caches.form) in forms.items():
            figures[case].add(logits(text), wanted, tokens)
    return [told(case, seen, alone.perplexity) for case, seen in figures.items()]
