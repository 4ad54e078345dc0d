"""Loaded models that compute in double precision beside their own, and answer by that.

A sum in another order moves a value in float32, now and then over the middle between two codes, and
what is computed of that code moves more of them: how many says nothing. In doubles two ways to
compute the same give the same codes on every CPU, for a value would have to lie within one part in
10**15 of a middle for others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.model import Model
from kvc8.ir.expression import Read
from kvc8.ir.precision.twins import Twins, make_exact
from kvc8.ir.program import expression_of
from kvc8.ir.run import Observe


@dataclass
class InDoubles(Model):
    """A model whose logits are in float64, as no rounding made them."""

    twins: Twins = field(default_factory=Twins)

    def step(
        self, phase: str, batch: Sequence[Rows], every: bool = False, observe: Observe | None = None
    ) -> Tensor:
        with torch.no_grad(), self.twins:
            logits = super().step(phase, batch, every, observe)
        return self.twins.twin(logits)

    def codes(self, name: str) -> Tensor:
        """A cache as no rounding made it."""
        return self.twins.twin(self.caches[name])


def in_doubles(model: Model, read: Read) -> InDoubles:
    """The same model; `read` gives the stored tensors that its parameters are made of."""
    found = InDoubles(**vars(model))
    for phase, program in model.programs.items():
        for node in program.parameters():
            exact = make_exact(expression_of(node), read)
            found.twins.pair(model.parameters[phase][node.name], exact)
    return found
