"""A compiled model inside of another engine: one function of inputs and caches.

    steps = load_steps(path, torch.device("npu", 0))
    caches = [torch.zeros(cache.shape(...), ...) for cache in steps.layout.caches]   # its own
    logits = steps.decode(inputs, caches)

The engine owns the blocks of the cache and says which token goes where; see `EmbeddedModel`. One
that asks for logits of rows that it chooses later loads the head apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.runtime.head import body, head
from kvc8.backends.runtime.kv_layout import KVLayout
from kvc8.backends.runtime.model import make_parameters
from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, type_of
from kvc8.ir.run import Value, run
from kvc8.ir.types import show_type


@dataclass(frozen=True)
class Step:
    """One program with its parameters on a device."""

    program: Program
    parameters: Mapping[str, Tensor]

    @property
    def inputs(self) -> Mapping[str, str]:
        """The inputs by name, with their types as a program's text has them; `ints` are lists."""
        return {node.name: show_type(type_of(node)) for node in self.program.inputs()}

    def __call__(self, inputs: Mapping[str, Value], caches: Sequence[Tensor]) -> Tensor:
        """Run a step: logits [R, vocabulary], or hidden states; the caches are written in place.

        `caches` are of the shapes that `layout` gives, of each layer K, then V. Raises TargetError
        where they are not as many as the program has, IRError where an input is missing.
        """
        names = [node.name for node in self.program.caches()]
        if len(caches) != len(names):
            what = f"{len(caches)} tensors for a program of {len(names)}"
            raise TargetError("caches", what, "give K and V of each layer")
        given = {name: inputs[name] for name in self.inputs if name in inputs}
        by_name = dict(zip(names, caches, strict=True))
        result, *written = run(self.program, {**self.parameters, **by_name, **given})
        for cache, new in zip(caches, written, strict=True):
            if new is not cache:  # a program that is not LOWERED gives new caches
                raise IRError("the program", "gives new caches", "embed what kvc8-compile wrote")
        return result


@dataclass(frozen=True)
class EmbeddedModel:
    """The programs of a compiled model.

    prefill takes fresh prompts end to end, chunk several tokens of sequences that have a past,
    decode one token of each. The inputs of each are those that its `inputs` names;
    backends/runtime/inputs.py says what they mean. Where `head` is apart, these give the hidden
    states of all rows, and it gives the logits of as many rows of `hidden` as it gets.
    """

    prefill: Step
    chunk: Step
    decode: Step
    layout: KVLayout
    block_size: int
    head: Step | None = None


def load_steps(
    path: Path, device: torch.device, rank: int = 0, head_apart: bool = False
) -> EmbeddedModel:
    """Read what kvc8-compile wrote and put the parameters of one rank on a device.

    The programs of several ranks call a process group "tp"; the engine gives its own that name by
    backends/runtime/ranks.py's `name_group`.

    On an NPU, call kvc8.backends.npu.device.load_torch_npu before importing this. Raises IRError or
    TargetError where the artifact is damaged.
    """
    artifact, made = read(path), dict[Expression, Tensor]()
    whole = artifact.of_rank(rank)
    programs = dict(whole)
    if head_apart:
        programs = {phase: body(program) for phase, program in whole.items()}
        programs["head"] = head(whole["decode"])
    steps = {
        name: Step(program, make_parameters(program, artifact.make, device, made))
        for name, program in programs.items()
    }
    return EmbeddedModel(**steps, layout=artifact.layout, block_size=artifact.block_size)
