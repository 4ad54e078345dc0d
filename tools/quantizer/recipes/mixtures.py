"""The linears of a mixture's experts: W8A8_DYNAMIC, as engines run them.

A scale a token is found at run time, so nothing of an expert's input is stored, and an expert that
no text has reached is as safe as the others: its scales are those of its weights. That no text has
reached it is noted all the same, for nothing is known of what it does to an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import mixture_ops
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.checkpoint.w8a8 import dynamic_part_types, quantize_dynamic
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import stored_names
from kvc8.ir.program import Program, argument, expression_of, is_parameter, tensor_type
from kvc8.ir.run import Value
from kvc8.tools.quantizer.model import Parts, QuantPlan
from kvc8.tools.quantizer.writer import ModelWriter

LABEL = "W8A8_DYNAMIC"


@dataclass(frozen=True)
class Experts:
    """One kind of linear of all experts: a call, and its modules for each expert in turn.

    gate_proj and up_proj of an expert read the same rows and are one kind.
    """

    call: Node
    modules: Sequence[Sequence[str]]

    @property
    def every(self) -> list[str]:
        """All of its modules."""
        return [module for modules in self.modules for module in modules]


def experts(program: Program) -> list[Experts]:
    """The kinds of a program whose weights are stored one by one."""
    found = []
    for call in program.calls(mixture_ops.grouped_linear):
        weight = argument(call, 1)
        names = list(stored_names(expression_of(weight))) if is_parameter(weight) else []
        count = int(tensor_type(weight).shape[0])
        if len(names) > 1 and len(names) % count == 0 and all(n.endswith(".weight") for n in names):
            modules = [name.removesuffix(".weight") for name in names]
            found.append(Experts(call, [modules[i::count] for i in range(count)]))
    return found


def choose_experts(found: Sequence[Experts], disabled: Sequence[str]) -> list[Experts]:
    """Those to quantize; a layer's experts stay float, all of them, where one of them is named."""
    named = {
        _layer(kind)
        for kind in found
        if any(fnmatch(module, pattern) for module in kind.every for pattern in disabled)
    }
    return [kind for kind in found if _layer(kind) not in named]


def _layer(kind: Experts) -> str:
    return kind.modules[0][0].rpartition(".experts.")[0]


def expert_types(checkpoint: Checkpoint, mixed: Sequence[Experts]) -> dict[str, Parts]:
    """What is written of each expert's linear, by module."""
    made = {}
    for module in (module for kind in mixed for module in kind.every):
        out, width = checkpoint.tensors[f"{module}.weight"].shape
        made[module] = dynamic_part_types(out, width)
    return made


@dataclass
class Reached:
    """Which of the experts of one kind a text has reached."""

    kind: Experts
    _seen: set[int] = field(default_factory=set)

    def see(self, args: Sequence[Value]) -> None:
        """See a call of kvc8.grouped_linear."""
        rows, _, _, counts = args[:4]
        assert isinstance(rows, Tensor)
        assert isinstance(counts, Tensor)
        if not bool(torch.isfinite(rows).all()):
            where = self.kind.modules[0][0]
            raise ModelError(where, "gets a value that is not finite", "check the model's weights")
        self._seen |= set(counts.nonzero().flatten().tolist())

    @property
    def found(self) -> Mapping[str, Tensor]:
        """The experts that no text has reached, for the run to remember."""
        missed = [i for i in range(len(self.kind.modules)) if i not in self._seen]
        return {f"{_layer(self.kind)}.experts": torch.tensor(missed, dtype=torch.int64)}


def missed(found: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The experts that no text has reached, of what a sweep has found in each layer."""
    every = (item for layer in found for item in layer.items())
    return [f"{name}.{i}" for name, which in every for i in which.tolist()]


def write_experts(plan: QuantPlan, writer: ModelWriter, kind: Experts) -> None:
    """Quantize and write the linears of a kind, one at a time."""
    for module in kind.every:
        parts = quantize_dynamic(load(plan.checkpoint.tensors[f"{module}.weight"]))
        for part, tensor in parts.items():
            writer.put(f"{module}.{part}", tensor)
