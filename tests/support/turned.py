"""A model before and after some of its weights are turned, as kvc8 and as transformers run it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from support.steps import step, values
from torch import Tensor
from torch.fx import Node
from transformers import AutoModelForCausalLM

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.program import Program
from kvc8.ir.run import run

TOKENS = [5, 17, 90, 3, 44, 44, 101, 7, 8]
# float64 rounds to 2**-53, and a few layers of some hundred sums multiply that.
BOUND = 1e-11
# transformers norms and takes softmax in float32 all the same, which rounds to 2**-24; the layers
# may multiply that by a thousand.
BOUND_OF_THEIRS = 2.0**-14


class _Site(Protocol):
    def stored(self) -> dict[str, Node]: ...


Site = TypeVar("Site", bound=_Site)


@dataclass(frozen=True)
class Turned(Generic[Site]):
    """What a program computes of `TOKENS` in float64, by node."""

    program: Program
    sites: list[Site]
    before: Mapping[object, Tensor]
    after: Mapping[object, Tensor]


def turned(
    source: Path,
    find: Callable[[Program, Checkpoint, set[str]], list[Site]],
    turn: Callable[[Site, Mapping[object, Tensor], dict[Node, Tensor]], None],
) -> Turned[Site]:
    """Turn a model by `turn(site, values, weights)` in every layer; its logits must stay."""
    checkpoint = open_checkpoint(source)
    program = capture(checkpoint, torch.float64)
    sites = find(program, checkpoint, set())
    assert len(sites) == len(program.calls(ops.paged_attention)) > 0
    made = values(program, source)
    given = step(TOKENS, [0], [len(TOKENS)], [list(range(8))])
    before, after = dict[object, Tensor](), dict[object, Tensor]()
    weights = {node: made[node.name] for node in program.parameters()}
    logits = run(program, {**made, **given}, before.__setitem__)[0]
    for site in sites:
        turn(site, before, weights)
    changed = {**made, **{node.name: value for node, value in weights.items()}}
    same = run(program, {**changed, **given}, after.__setitem__)[0]
    assert (same - logits).abs().max() < BOUND * logits.abs().max()
    _check_theirs(source, sites, weights)
    return Turned(program, sites, before, after)


def _check_theirs(source: Path, sites: Sequence[_Site], weights: Mapping[Node, Tensor]) -> None:
    """The same weights in transformers, which knows nothing of turns."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    stored = {name: weights[node] for site in sites for name, node in site.stored().items()}
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits
        assert model.load_state_dict(stored, strict=False).unexpected_keys == []
        same = model(torch.tensor([TOKENS])).logits
    assert (same - logits).abs().max() < BOUND_OF_THEIRS * logits.abs().max()
