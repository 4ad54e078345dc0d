"""The linears of a mixture's experts: each is quantized by itself, with the range it has seen.

An expert that no text has reached takes the range of all experts together, for its input comes
out of the same values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.checkpoint.w8a8 import Range, finite
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import stored_names
from kvc8.ir.program import Program, argument, expression_of, is_parameter, tensor_type
from kvc8.ir.run import Value


@dataclass(frozen=True)
class Experts:
    """One kind of linear of all experts: a call, and its modules for each expert in turn.

    gate_proj and up_proj of an expert read the same rows and are one kind.
    """

    call: Node
    modules: Sequence[Sequence[str]]


def experts(program: Program) -> list[Experts]:
    """The kinds of a program whose weights are stored one by one."""
    found = []
    for call in program.calls(ops.grouped_linear):
        weight = argument(argument(call, 1), 0)  # of a transpose
        names = list(stored_names(expression_of(weight))) if is_parameter(weight) else []
        count = int(tensor_type(weight).shape[0])
        if names and len(names) % count == 0 and all(n.endswith(".weight") for n in names):
            each = len(names) // count
            modules = [name.removesuffix(".weight") for name in names]
            split = [modules[i : i + each] for i in range(0, len(modules), each)]
            found.append(Experts(call, split))
    return found


def choose_experts(
    found: Sequence[Experts], disabled: Sequence[str], down_proj: bool
) -> list[Experts]:
    """Those to quantize: a kind stays float where a module of it is named, or is a down_proj."""
    patterns = [*disabled, *([] if down_proj else ["*.down_proj"])]
    return [
        kind
        for kind in found
        if not any(fnmatch(m, p) for modules in kind.modules for m in modules for p in patterns)
    ]


@dataclass
class ExpertRanges:
    """What the experts of one kind have seen."""

    kind: Experts
    _seen: dict[int, Range] = field(default_factory=dict)

    def see(self, args: Sequence[Value]) -> None:
        """See a call of kvc8.grouped_linear: rows sorted by expert, and where each ends."""
        rows, _, ends = args[:3]
        assert isinstance(rows, Tensor)
        assert isinstance(ends, Tensor)
        start = 0
        for expert, end in enumerate(ends.long().tolist()):
            if end > start:
                part = rows[start:end]
                self._widen(expert, Range(float(part.min()), float(part.max())))
            start = end

    def _widen(self, expert: int, new: Range) -> None:
        if not finite(new):
            raise ModelError(
                f"{self.kind.modules[expert][0]}",
                "gets a value that is not finite",
                "check the model's weights",
            )
        old = self._seen.get(expert, new)
        self._seen[expert] = Range(min(old.low, new.low), max(old.high, new.high))

    def range(self, expert: int) -> Range:
        """The range of an expert's input."""
        if expert in self._seen:
            return self._seen[expert]
        seen = self._seen.values()
        return Range(min(r.low for r in seen), max(r.high for r in seen))
