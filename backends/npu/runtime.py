"""A program with its parameters and caches, on a device or emulated on a CPU, one step at a time.

Prefill takes fresh prompts and decode one token of each sequence; both write to the paged cache.
Programs of every stage run here: each says by name which of these inputs it takes.

    input_ids     i64[T]     positions  i64[T]   slot_mapping  i32[T]      logits_rows   i64[R]
    query_ends    ints[B]    kv_lens    ints[T]  block_table   i32[B, M]   seq_lens      i32[B]
    query_starts  i32[B + 1]
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvc8.backends.npu import emulation as emulation
from kvc8.backends.npu.kv_layout import KVLayout, kv_layout
from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.program import Program, recipe_of
from kvc8.ir.recipe import Recipe
from kvc8.ir.run import Observe, Runner, Value, run

CPU = torch.device("cpu")
PACKS = ("query_ends", "query_starts")  # a prefill with one of these takes several prompts
INPUTS = frozenset(
    ("input_ids", "positions", "slot_mapping", "logits_rows", "kv_lens", "block_table", "seq_lens")
).union(PACKS)
KV_SCALE = re.compile(r"[kv]_(\w+_)?scale_\d+(_\w+)?")


@dataclass(frozen=True)
class Rows:
    """The new tokens of one sequence: `tokens` go to positions `start`, `start` + 1, ..."""

    tokens: Sequence[int]
    start: int
    table: Sequence[int]  # its blocks, in the order of its tokens


@dataclass
class Model:
    """What `load` makes. `prefill` and `decode` write to `caches`, which may be looked into."""

    programs: Mapping[str, Program]
    parameters: Mapping[str, Mapping[str, Tensor]]  # by phase and name
    caches: dict[str, Tensor]  # by name, [blocks, block_size, heads, head_dim]
    layout: KVLayout
    block_size: int
    device: torch.device
    runner: Runner = run  # or a graphs.Recorder

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
        names = {node.name for node in self.programs["prefill"].inputs()}
        if names.intersection(PACKS):
            return self.step("prefill", batch, every, observe)
        return torch.cat([self.step("prefill", [rows], every, observe) for rows in batch])

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

    def step(
        self, phase: str, batch: Sequence[Rows], every: bool = False, observe: Observe | None = None
    ) -> Tensor:
        """Run one program once. See prefill and decode."""
        program = self.programs[phase]
        given = inputs(batch, self.block_size, self.device, every)
        chosen = {node.name: given[node.name] for node in program.inputs()}
        values = {**self.parameters[phase], **self.caches, **chosen}
        logits, *caches = self.runner(program, values, observe)
        # A program writes in place or gives new caches; either way these are now the caches.
        self.caches.update(zip(self.caches, caches, strict=True))
        return logits.to(CPU)


def inputs(
    batch: Sequence[Rows], block_size: int, device: torch.device, every: bool = False
) -> dict[str, Value]:
    """Everything a program may take of a batch, by name; see the module. Lists stay on the host."""
    counts = [len(rows.tokens) for rows in batch]
    ends = list(accumulate(counts))
    lengths = [rows.start + len(rows.tokens) for rows in batch]
    width = max(len(rows.table) for rows in batch)
    tables = [[*rows.table, *[0] * (width - len(rows.table))] for rows in batch]
    wide = {
        "input_ids": [token for rows in batch for token in rows.tokens],
        "positions": [p for rows in batch for p in _places(rows)],
        "logits_rows": list(range(ends[-1])) if every else [end - 1 for end in ends],
    }
    narrow = {
        "slot_mapping": [_slot(rows, p, block_size) for rows in batch for p in _places(rows)],
        "block_table": tables,
        "seq_lens": lengths,
        "query_starts": [0, *ends],
    }
    return {
        **{k: torch.tensor(v, dtype=torch.int64, device=device) for k, v in wide.items()},
        **{k: torch.tensor(v, dtype=torch.int32, device=device) for k, v in narrow.items()},
        "query_ends": ends,
        "kv_lens": lengths,
    }


def _places(rows: Rows) -> range:
    return range(rows.start, rows.start + len(rows.tokens))


def _slot(rows: Rows, position: int, block_size: int) -> int:
    block, offset = divmod(position, block_size)
    if block >= len(rows.table):
        raise TargetError(
            f"position {position}: lies outside the {len(rows.table)} blocks of its sequence; "
            "give the sequence more blocks"
        )
    return rows.table[block] * block_size + offset


def load(
    programs: Mapping[str, Program],
    make: Callable[[Recipe], Tensor],
    *,
    blocks: int,
    block_size: int,
    device: torch.device = CPU,
) -> Model:
    """Make the parameters of programs by `make`, and empty caches.

    `programs` are "prefill" and "decode": an artifact's, or one program of an earlier stage under
    both names. Weights stay mapped on a CPU. Raises IRError for an input that is not known, and
    TargetError for a KV scale that is zero, negative or no number.
    """
    for program in programs.values():
        _check_inputs(program)
    made: dict[Recipe, Tensor] = {}
    parameters = {p: make_parameters(programs[p], make, device, made) for p in programs}
    layout = kv_layout(programs["decode"])
    caches = {
        cache.name: torch.zeros(
            (blocks, block_size, cache.heads, cache.head_dim), dtype=cache.dtype, device=device
        )
        for cache in layout.caches
    }
    return Model(programs, parameters, caches, layout, block_size, device)


def _check_inputs(program: Program) -> None:
    for node in program.inputs():
        if node.name not in INPUTS:
            known = ", ".join(sorted(INPUTS))
            raise IRError(f"{node.name}: is no input that the runtime gives; use {known}")


def make_parameters(
    program: Program,
    make: Callable[[Recipe], Tensor],
    device: torch.device,
    made: dict[Recipe, Tensor],
) -> dict[str, Tensor]:
    """The parameters by name; equal recipes are made once, and kept in `made`.

    Raises TargetError for a KV scale that is zero, negative or no number.
    """
    found = {}
    for node in program.parameters():
        recipe = recipe_of(node)
        if recipe not in made:
            made[recipe] = make(recipe).to(device)
        found[node.name] = made[recipe]
        if KV_SCALE.fullmatch(node.name):
            _check_scale(node.name, made[recipe])
    return found


def _check_scale(name: str, scale: Tensor) -> None:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        what = "has a KV scale that is zero, negative or not a number"
        raise TargetError(f"{name}: {what}; compile a model whose shards hold its weights")
