"""An ONNX directory of either flavor as a model that generates text, as an NPU artifact is one.

A dense cache is a paged one with one block for each sequence: its row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.npu.inputs import Rows, inputs
from kvc8.backends.npu.kv_layout import Cache, KVLayout
from kvc8.backends.onnx.runner import Port, Session, load
from kvc8.ir.model_files import read_json

CPU = torch.device("cpu")
PAGE = 128  # tokens a block of the flavor standard gets; any number works


@dataclass
class Model:
    """What `open_model` makes. `prefill` and `decode` write to `caches`."""

    session: Session
    config: Mapping[str, object]  # the model's own config.json
    layout: KVLayout
    block_size: int = PAGE

    @property
    def caches(self) -> Mapping[str, Tensor]:
        """The caches as they are, by name."""
        return self.session.kept

    def allocate(self, blocks: int | None, tokens: Sequence[int]) -> None:
        """Start with empty caches, of `blocks` blocks or enough for sequences of so many tokens."""
        if self.session.flavor == "gqa":
            self.block_size = max(2, *tokens)  # a row that rests takes one token and one of padding
        enough = sum(-(-count // self.block_size) for count in tokens)
        self.session.allocate(blocks or enough, self.block_size)

    def prefill(self, prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]) -> Tensor:
        """Take fresh prompts into the blocks of `tables`; logits [B, vocabulary]."""
        return self.mixed([Rows(p, 0, table) for p, table in zip(prompts, tables, strict=True)])

    def mixed(self, batch: Sequence[Rows]) -> Tensor:
        """Take the next tokens of sequences, of any kind; logits [B, vocabulary]."""
        if self.session.flavor == "standard":
            return self._paged(batch)
        return torch.cat([self._alone(rows) for rows in batch])

    def decode(
        self, tokens: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Take one token of each sequence; logits [B, vocabulary].

        `lengths` are the tokens of each sequence with the new one, which goes to the last place.
        """
        each = zip(tokens, lengths, tables, strict=True)
        batch = [Rows([token], length - 1, table) for token, length, table in each]
        return self._paged(batch) if self.session.flavor == "standard" else self._together(batch)

    def _paged(self, batch: Sequence[Rows]) -> Tensor:
        names = [port.name for port in self.session.inputs]
        given = inputs(batch, self.block_size, CPU, names=names)
        return self.session.run({k: v for k, v in given.items() if isinstance(v, Tensor)})[0]

    def _alone(self, rows: Rows) -> Tensor:
        """A prompt in its own row of the cache, so that none is padded to another's length."""
        [row] = rows.table
        count, places = len(rows.tokens), list(range(rows.start, rows.length))
        given = _dense([list(rows.tokens)], [places], [rows.length], [count], [count - 1])
        return self.session.run(given, slice(row, row + 1))[0]

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
        return self.session.run(given)[0]


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


def open_model(out: Path, threads: int = 0) -> Model:
    """Load what `emit` wrote; allocate its caches before use. Raises TargetError or ModelError."""
    session = load(out, threads)
    layout = KVLayout(tuple(_cache(port, session.flavor) for port in session.caches))
    return Model(session, read_json(out / "config.json"), layout)


def _cache(port: Port, flavor: str) -> Cache:
    heads, dim = port.shape[2 if flavor == "standard" else 1], port.shape[3]
    assert isinstance(heads, int)
    assert isinstance(dim, int)
    return Cache(port.name, heads, dim, port.dtype)
