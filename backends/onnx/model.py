"""An ONNX directory of any flavor as a model that generates text, as an NPU artifact is one.

A dense cache is a paged one with one block for each sequence: its row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.onnx.runner import Port, Session, load, phases_of
from kvc8.backends.runtime.inputs import PACKS, Rows, inputs
from kvc8.backends.runtime.kv_layout import Cache, KVLayout
from kvc8.ir.checkpoint.model_files import read_json

CPU = torch.device("cpu")
PAGE = 128  # tokens a block of a paged cache gets; any multiple of 32 works


@dataclass
class OnnxModel:
    """What `open_model` makes. Its steps write to `caches`, which may be looked into."""

    sessions: Mapping[str, Session]  # by phase: "prefill", "chunk" and "decode"
    config: Mapping[str, object]  # the model's own config.json
    layout: KVLayout
    block_size: int = PAGE

    @property
    def flavor(self) -> str:
        """Which flavor of ONNX it is."""
        return self.sessions["decode"].flavor

    @property
    def caches(self) -> Mapping[str, Tensor]:
        """The caches as they are, by name."""
        return self.sessions["decode"].kept

    def allocate(self, blocks: int | None, tokens: Sequence[int]) -> None:
        """Start with empty caches, of `blocks` blocks or enough for sequences of so many tokens."""
        if self.flavor == "gqa":
            self.block_size = max(2, *tokens)  # a row that rests takes one token and one of padding
        enough = sum(-(-count // self.block_size) for count in tokens)
        self.sessions["decode"].allocate(blocks or enough, self.block_size)
        for session in self.sessions.values():
            session.kept = self.sessions["decode"].kept

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        tables: Sequence[Sequence[int]],
        every: bool = False,
    ) -> Tensor:
        """Take fresh prompts into the blocks of `tables`; logits [B, vocabulary].

        With `every`, those of each token: [tokens of all prompts, vocabulary].
        """
        batch = [Rows(p, 0, table) for p, table in zip(prompts, tables, strict=True)]
        if not every:
            return self.mixed(batch)
        if self.flavor == "gqa":
            return torch.cat([self._alone(rows, every=True) for rows in batch])
        phase = "prefill" if "prefill" in self.sessions else "decode"
        return torch.cat([self._paged(phase, [rows], every=True) for rows in batch])

    def mixed(self, batch: Sequence[Rows]) -> Tensor:
        """Take the next tokens of sequences, of any kind; logits [B, vocabulary]."""
        if self.flavor == "standard":
            return self._paged("decode", batch)
        if self.flavor == "gqa":
            return torch.cat([self._alone(rows) for rows in batch])
        return self._by_phase(batch)

    def _by_phase(self, batch: Sequence[Rows]) -> Tensor:
        """Each row by the program for it, and together where it can tell sequences apart."""
        found: dict[int, Tensor] = {}
        for phase, session in self.sessions.items():
            chosen = [i for i, rows in enumerate(batch) if rows.phase == phase]
            packed = phase == "decode" or {p.name for p in session.inputs}.intersection(PACKS)
            for indices in [chosen] if packed and chosen else [[i] for i in chosen]:
                logits = self._paged(phase, [batch[i] for i in indices])
                found.update(zip(indices, logits, strict=True))
        return torch.stack([found[i] for i in range(len(batch))])

    def decode(
        self, tokens: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Take one token of each sequence; logits [B, vocabulary].

        `lengths` are the tokens of each sequence with the new one, which goes to the last place.
        """
        each = zip(tokens, lengths, tables, strict=True)
        batch = [Rows([token], length - 1, table) for token, length, table in each]
        return self._together(batch) if self.flavor == "gqa" else self._paged("decode", batch)

    def _paged(self, phase: str, batch: Sequence[Rows], every: bool = False) -> Tensor:
        session = self.sessions[phase]
        names = [port.name for port in session.inputs]
        given = inputs(batch, self.block_size, CPU, every=every, names=names)
        return session.run({name: torch.as_tensor(x) for name, x in given.items()})[0]

    def _alone(self, rows: Rows, every: bool = False) -> Tensor:
        """A sequence in its own row of the cache, so that none is padded to another's length."""
        [row] = rows.table
        count, places = len(rows.tokens), list(range(rows.start, rows.length))
        wanted = list(range(count)) if every else [count - 1]
        given = _dense([list(rows.tokens)], [places], [rows.length], [count], wanted)
        return self.sessions["decode"].run(given, slice(row, row + 1))[0]

    def _together(self, batch: Sequence[Rows]) -> Tensor:
        """One token in each row of the cache that is in use; the others rest."""
        count = next(iter(self.caches.values())).shape[0]
        ids, positions, new = ([0] * count for _ in range(3))
        lens = [1] * count
        for rows in batch:
            [row] = rows.table
            [ids[row]] = rows.tokens
            positions[row], lens[row], new[row] = rows.start, rows.start + 1, 1
        wanted = [rows.table[0] for rows in batch]
        given = _dense([[i] for i in ids], [[p] for p in positions], lens, new, wanted)
        return self.sessions["decode"].run(given)[0]


def _dense(
    ids: list[list[int]],
    positions: list[list[int]],
    lens: list[int],
    new: list[int],
    wanted: list[int],
) -> dict[str, Tensor]:
    """The inputs of the flavor gqa."""
    return {
        "input_ids": torch.tensor(ids),
        "positions": torch.tensor(positions),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "query_lens": torch.tensor(new, dtype=torch.int32),
        "logits_rows": torch.tensor(wanted),
    }


def open_model(out: Path, threads: int = 0) -> OnnxModel:
    """Load what `emit` or `emit_lowered` wrote; allocate its caches before use.

    Raises TargetError or ModelError where it is not that.
    """
    sessions = {phase: load(out, threads, phase) for phase in phases_of(out)}
    sessions.setdefault("decode", next(iter(sessions.values())))
    decoding = sessions["decode"]
    layout = KVLayout(tuple(_cache(port, decoding.flavor) for port in decoding.caches))
    return OnnxModel(sessions, read_json(out / "config.json"), layout)


def _cache(port: Port, flavor: str) -> Cache:
    heads, dim = port.shape[1 if flavor == "gqa" else 2], port.shape[3]
    assert isinstance(heads, int)
    assert isinstance(dim, int)
    return Cache(port.name, heads, dim, port.dtype)
