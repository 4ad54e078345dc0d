"""A compiled model as a model of vLLM: programs in place of layers.

`forward` gives the hidden states of all rows, and `compute_logits` runs the head over those that
vLLM asks for. A step is one call for each of its phases; vLLM's tensors are cut, not read back.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context

from kvc8.backends.npu.artifact import identity
from kvc8.backends.npu.embed import Step, load_steps
from kvc8.backends.runtime.calls import calls
from kvc8.backends.runtime.head import HIDDEN
from kvc8.backends.runtime.inputs import Batch, Rows, batch_of, inputs_of
from kvc8.backends.runtime.kv_layout import KVLayout
from kvc8.backends.runtime.ranks import check_alike, name_group
from kvc8.backends.vllm.cache import StepPlaces, layers_of
from kvc8.ir.errors import TargetError
from kvc8.ir.program import tensor_type


class CompiledModel(nn.Module):
    """What kvc8-compile wrote, to vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.device = vllm_config.device_config.device
        self.longest = vllm_config.model_config.max_model_len
        path = Path(vllm_config.model_config.model)
        self.steps, self.layout, self.block_size = self.load(path, self.device, self.rank(path))
        self.programs = {phase: step.program for phase, step in self.steps.items()}
        self.names = {phase: tuple(step.inputs) for phase, step in self.steps.items()}
        self.layers = layers_of(self.layout, self.block_size)
        context = vllm_config.compilation_config.static_forward_context
        for i, layer in enumerate(self.layers):
            context[f"{prefix}model.layers.{i}.attn"] = layer

    def rank(self, path: Path) -> int:
        """Which rank of the model this process is; programs of several call vLLM's own group.

        Raises TargetError where another rank has another artifact.
        """
        group = get_tp_group()
        if group.world_size > 1:
            name_group(group.device_group)
            check_alike(identity(path), self.device, group.device_group)
        found: int = group.rank_in_group
        return found

    @staticmethod
    def load(
        path: Path, device: torch.device, rank: int
    ) -> tuple[Mapping[str, Step], KVLayout, int]:
        """The steps of a rank by name, "head" among them; its caches; the tokens a block has."""
        found = load_steps(path, device, rank, head_apart=True)
        assert found.head is not None
        steps = {
            "prefill": found.prefill,
            "chunk": found.chunk,
            "decode": found.decode,
            "head": found.head,
        }
        return steps, found.layout, found.block_size

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Not given: tokens go into the programs."""
        raise TargetError("prompt embeddings", "a compiled model takes tokens", "send these")

    def load_weights(self, weights: object) -> set[str]:
        """Nothing is left to load: the parameters were made with the programs."""
        return set()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: object = None,
        **_: object,
    ) -> Tensor:
        """The hidden states of rows [T], [T, C]; the caches of all layers are written."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM tries how much memory a step takes
            return self.rehearse(len(input_ids))
        placed: StepPlaces = next(iter(metadata.values()))
        caches = [cache for layer in self.layers for cache in layer.caches]
        batch = Batch(
            tokens=input_ids.long(),
            positions=positions,
            slots=placed.slots,
            tables=placed.tables,
            counts=placed.counts,
            lengths=placed.lengths,
            block_size=self.block_size,
        )
        return self.run(batch, caches, len(input_ids))

    def run(self, batch: Batch, caches: Sequence[Tensor], rows: int) -> Tensor:
        """The hidden states of a batch, [rows, C]; zeros past its own rows."""
        starts = [0, *batch.ends]
        hidden: Tensor | None = None
        for phase, chosen in calls(self.programs, batch.counts, batch.lengths):
            for first, last in _runs(chosen):
                found = self.call(phase, batch.take(first, last), caches).flatten(0, -2)
                if hidden is None:
                    hidden = found.new_zeros(rows, found.shape[-1])
                hidden[starts[first] : starts[last]] = found
        assert hidden is not None
        return hidden

    def call(self, phase: str, batch: Batch, caches: Sequence[Tensor]) -> Tensor:
        """One run of one program."""
        return self.steps[phase](inputs_of(batch, self.names[phase]), caches)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The logits of rows of hidden states [R, C], [R, vocabulary]."""
        head = self.steps["head"]
        [node] = head.program.inputs()
        shape = [size if isinstance(size, int) else -1 for size in tensor_type(node).shape]
        return head({HIDDEN: hidden_states.reshape(shape)}, [])

    def rehearse(self, rows: int) -> Tensor:
        """Fresh prompts of so many rows, and then as many rows of one that has the longest past.

        One layer's caches stand for all of them, for the caches themselves are not there yet.
        """
        fresh = [self.longest] * (rows // self.longest) + [rows % self.longest]
        new = min(rows, self.longest - 1)
        for pairs in ([(size, size) for size in fresh if size], [(new, self.longest)]):
            given, blocks = [], 0
            for size, length in pairs:
                table = range(blocks, blocks + -(-length // self.block_size))
                given.append(Rows([0] * size, length - size, table))
                blocks = table.stop
            batch = batch_of(given, self.block_size, self.device)
            hidden = self.run(batch, self.scratch(blocks), rows)
        return hidden

    def scratch(self, blocks: int) -> list[Tensor]:
        """Caches of so many blocks, which all layers of one shape share: a K and a V."""
        made: dict[object, Tensor] = {}
        found = []
        for i, cache in enumerate(self.layout.caches):
            key = (i % 2, cache.shape(blocks, self.block_size), cache.dtype)
            if key not in made:
                made[key] = torch.zeros(key[1], dtype=cache.dtype, device=self.device)
            found.append(made[key])
        return found


def _runs(chosen: Sequence[int]) -> list[tuple[int, int]]:
    """The stretches of neighbors in ascending numbers, each as the first and the one after."""
    breaks = [b for a, b in pairwise(chosen) if b != a + 1]
    firsts = [chosen[0], *breaks]
    lasts = [chosen[chosen.index(b) - 1] for b in breaks]
    return [(a, b + 1) for a, b in zip(firsts, [*lasts, chosen[-1]], strict=True)]
