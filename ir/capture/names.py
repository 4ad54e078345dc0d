"""The names that tensors have in a checkpoint, where transformers gives the model's others.

transformers renames some as it loads them (`block_sparse_moe.` to `mlp.`), and puts the experts of
a mixture, each stored apart, into one parameter. Its own table of both is asked here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)


@dataclass(frozen=True)
class Packing:
    """A parameter of all experts: the end of its name, and those of its parts, `*` for a number."""

    target: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """Where a model's parameters are stored."""

    renamed: dict[str, str]  # the name in the model, where it is not the stored one, to that
    packings: tuple[Packing, ...]

    def stored(self, name: str) -> str:
        """The stored name of a parameter."""
        return self.renamed.get(name, name)

    def experts(self, name: str) -> tuple[str, ...]:
        """The names of what a packed parameter is made of, `*` for the expert; () for another."""
        for packing in self.packings:
            if name.endswith(packing.target):
                head = name.removesuffix(packing.target)
                return tuple(self._pattern(head + source) for source in packing.sources)
        return ()

    def _pattern(self, source: str) -> str:
        before, _, after = source.partition("*")
        first = self.stored(f"{before}0{after}")
        return f"{first.removesuffix('0' + after)}*{after}"


def names_of(kinds: Iterable[str], tensors: Iterable[str]) -> Names:
    """The names of a model, by its type and its class, whose stored tensors are these."""
    steps = [step for kind in kinds for step in get_checkpoint_conversion_mapping(kind) or []]
    renamings = [step for step in steps if type(step) is WeightRenaming]
    renamed = {}
    for name in tensors if renamings else ():
        new = name
        for step in renamings:
            new, _ = step.rename_source_key(new)
        if new != name:
            renamed[new] = name
    packed = [step for step in steps if isinstance(step, WeightConverter) and _packs(step)]
    return Names(
        renamed, tuple(Packing(p.target_patterns[0], tuple(p.source_patterns)) for p in packed)
    )


def _packs(step: WeightConverter) -> bool:
    """Whether a step stacks the experts, and joins their linears' outputs, and does no more."""
    kinds = [type(operation) for operation in step.operations]
    outputs = all(op.dim == 1 for op in step.operations if isinstance(op, Concatenate))
    stacks = kinds == [MergeModulelist] or (kinds == [MergeModulelist, Concatenate] and outputs)
    return stacks and len(step.target_patterns) == 1
