"""A program with its parameters and caches, on a device or emulated on a CPU, one step at a time.

Prefill takes fresh prompts, a chunk several tokens of a sequence that has a past, and decode one
token of each sequence; all write to the paged cache. Programs of every stage run here: each says
by name which inputs it takes (backends/runtime/inputs.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.backends.npu import emulation as emulation
from kvc8.backends.runtime.calls import apart, calls
from kvc8.backends.runtime.inputs import CPU, Rows, check_inputs, inputs
from kvc8.backends.runtime.kv_layout import KVLayout, kv_layout
from kvc8.ir.errors import TargetError
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, expression_of
from kvc8.ir.run import Again, Observe, Runner, run

KV_SCALE = re.compile(r"[kv]_(\w+_)?scale_\d+(_\w+)?")


@dataclass
class Model:
    """What `load` makes. Its steps write to `caches`, which may be looked into."""

    programs: Mapping[str, Program]
    parameters: Mapping[str, Mapping[str, Tensor]]  # by phase and name
    caches: dict[str, Tensor]  # by name, of the shapes in `layout`
    layout: KVLayout
    block_size: int
    device: torch.device
    runner: Runner = run  # or Again, or a graphs.Recorder

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        tables: Sequence[Sequence[int]],
        every: bool = False,
        observe: Observe | None = None,
    ) -> Tensor:
        """Take fresh prompts into the blocks of `tables`; logits [B, vocabulary] on the CPU.

        With `every`, the logits of every token: [all tokens, vocabulary].
        """
        batch = [Rows(p, 0, t) for p, t in zip(prompts, tables, strict=True)]
        return self.several("prefill", batch, every, observe)

    def chunk(
        self, batch: Sequence[Rows], every: bool = False, observe: Observe | None = None
    ) -> Tensor:
        """Take several tokens of sequences that have a past; logits as of prefill."""
        return self.several("chunk", batch, every, observe)

    def mixed(self, batch: Sequence[Rows], observe: Observe | None = None) -> Tensor:
        """Take rows of every kind, each by the program for it; logits [B, vocabulary] in order."""
        counts, lengths = [len(rows.tokens) for rows in batch], [rows.length for rows in batch]
        found: dict[int, Tensor] = {}
        for phase, chosen in calls(self.programs, counts, lengths):
            logits = self.step(phase, [batch[i] for i in chosen], observe=observe)
            found |= zip(chosen, logits, strict=True)
        return torch.stack([found[i] for i in range(len(batch))])

    def decode(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[int]],
        observe: Observe | None = None,
    ) -> Tensor:
        """Take one token of each sequence; logits [B, vocabulary] on the CPU.

        `lengths` are the tokens of each sequence with the new one, which goes to the last place.
        """
        each = zip(tokens, lengths, tables, strict=True)
        return self.step("decode", [Rows([t], n - 1, b) for t, n, b in each], observe=observe)

    def several(
        self, phase: str, batch: Sequence[Rows], every: bool = False, observe: Observe | None = None
    ) -> Tensor:
        """Run a program once, or once for each sequence where it cannot tell them apart."""
        counts = [len(rows.tokens) for rows in batch]
        parts = apart(self.programs, phase, range(len(batch)), counts)
        each = [(phase, [batch[i] for i in chosen]) for phase, chosen in parts]
        return torch.cat([self.step(phase, rows, every, observe) for phase, rows in each])

    def step(
        self, phase: str, batch: Sequence[Rows], every: bool = False, observe: Observe | None = None
    ) -> Tensor:
        """Run one program once. See prefill and decode."""
        program = self.programs[phase]
        names = [node.name for node in program.inputs()]
        chosen = inputs(batch, self.block_size, self.device, every, names)
        values = {**self.parameters[phase], **self.caches, **chosen}
        logits, *caches = self.runner(program, values, observe)
        # A program writes in place or gives new caches; either way these are now the caches.
        self.caches.update(zip(self.caches, caches, strict=True))
        return logits.to(CPU)


def load(
    programs: Mapping[str, Program],
    make: Callable[[Expression], Tensor],
    *,
    blocks: int,
    block_size: int,
    device: torch.device = CPU,
) -> Model:
    """Make the parameters of programs by `make`, and empty caches.

    `programs` are "prefill", "chunk" and "decode": an artifact's, or one program of an earlier
    stage under those names; what is not called may be left out, but for decode. Weights stay
    mapped on a CPU. Raises IRError for an input that is not known, and TargetError for a KV scale
    that is zero, negative or no number.
    """
    for program in programs.values():
        check_inputs(program)
    made: dict[Expression, Tensor] = {}
    parameters = {p: make_parameters(programs[p], make, device, made) for p in programs}
    layout = kv_layout(programs["decode"])
    caches = {
        cache.name: torch.zeros(cache.shape(blocks, block_size), dtype=cache.dtype, device=device)
        for cache in layout.caches
    }
    runner = Again(emulation.KERNELS) if device.type == "cpu" else run
    return Model(programs, parameters, caches, layout, block_size, device, runner)


def make_parameters(
    program: Program,
    make: Callable[[Expression], Tensor],
    device: torch.device,
    made: dict[Expression, Tensor],
) -> dict[str, Tensor]:
    """The parameters by name; equal expressions are made once, and kept in `made`.

    Raises TargetError for a KV scale that is zero, negative or no number.
    """
    found = {}
    for node in program.parameters():
        expression = expression_of(node)
        if expression not in made:
            made[expression] = make(expression).to(device)
        found[node.name] = made[expression]
        if KV_SCALE.fullmatch(node.name):
            _check_scale(node.name, made[expression])
    return found


def _check_scale(name: str, scale: Tensor) -> None:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        what = "has a KV scale that is zero, negative or not a number"
        raise TargetError(name, what, "compile a model whose shards hold its weights")
