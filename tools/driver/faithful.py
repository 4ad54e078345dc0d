"""Hold a captured program to transformers' own model of the same directory.

Both run the same tokens in float64: the program the first of them as a prompt and the rest one by
one, out of its cache; transformers all at once, without a cache.

What may they differ by? A model is meant to run in float32 or less. Rounding there may, at the
worst that leaves it a model at all, move its logits by as much as their own size: by one part of
one of the largest. To first order an error grows with the unit of rounding, 2**-53 in float64 and
2**-24 in float32, so there each is off by 2**-29 of the largest logit at most, and two differ by
2**-28 of it. What differs by more differs in real numbers: something else is computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.backends.runtime.inputs import CPU, Rows, inputs
from kvc8.ir import ops
from kvc8.ir.capture.original import ModuleValues, Original, open_original
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import ModelError
from kvc8.ir.precision.doubled import LINEAR, run_doubled
from kvc8.ir.program import Program, argument, is_call, tensor_type
from kvc8.ir.run import Value
from kvc8.ir.types import size

LIMIT = 2.0**-28
BLOCK = 16  # tokens of the cache
TOKENS = 24  # enough for a check that is not to take long
ATEN = torch.ops.aten
MOVES = (ATEN.reshape.default, ATEN.unsqueeze.default, ATEN.transpose.int)  # which compute nothing
Watch = Callable[[Node, Callable[[Node], Value]], None]


@dataclass(frozen=True)
class Held:
    """The logits [T, vocabulary] of a program and of transformers, and what is wrong if any is."""

    ours: Tensor
    theirs: Tensor
    problem: ModelError | None


def hold(
    checkpoint: Checkpoint,
    program: Program,
    tokens: Sequence[int],
    steps: int = 1,
) -> Held:
    """Compare on tokens, of which the last `steps` are taken one by one.

    Raises ModelError where transformers cannot run the model.
    """
    original = open_original(checkpoint, _dtype(program))
    pair = _Pair(program, original, tokens, steps, checkpoint.tensors)
    theirs, _ = original.run(tokens)
    ours = pair.run()
    name = type(original.model).__name__
    if not theirs.isfinite().all():
        what = f"transformers' own {name} gives logits that are not finite"
        what = f"{what}, first in {pair.first_difference()}"
        return Held(ours, theirs, ModelError(place(checkpoint.path), what, CHECK_WEIGHTS))
    bound = LIMIT * float(theirs.abs().max())
    off = (ours - theirs).abs().amax(-1)
    wrong = (~(off <= bound)).nonzero().flatten().tolist()  # what is not a number is wrong too
    if not wrong:
        return Held(ours, theirs, None)
    where = "a decode step" if wrong[0] >= pair.prompt else f"token {wrong[0]}"
    sizes = f"{float(off.max()):.2g} off of {float(theirs.abs().max()):.2g}"
    what = f"the captured program's logits are {sizes} from transformers' own"
    what = f"{what} {name}, from {where} on"
    what = f"{what}, first in {pair.first_difference()}"
    return Held(ours, theirs, ModelError(place(checkpoint.path), what, DO))


def check_capture(checkpoint: Checkpoint, captured: Program) -> None:
    """Hold a captured program to transformers' own model on a few tokens.

    Raises ModelError where it computes something else, or transformers cannot run the model.
    """
    vocabulary = int(str(checkpoint.config["vocab_size"]))
    found = hold(checkpoint, captured, [(5 + 37 * i) % vocabulary for i in range(TOKENS)])
    if found.problem:
        raise found.problem


DO = "do not trust what is compiled of it, and report the model"
CHECK_WEIGHTS = "check the model's weights"


def _dtype(program: Program) -> torch.dtype:
    """What a program computes in: the dtype of its residual stream."""
    return tensor_type(program.calls(ATEN.embedding.default)[0]).dtype


@dataclass(frozen=True)
class _Pair:
    """A program and the model that it was captured from, on the same tokens."""

    program: Program
    original: Original
    tokens: Sequence[int]
    steps: int
    stored: Mapping[str, StoredTensor]

    @property
    def prompt(self) -> int:
        """How many tokens are taken at once."""
        return len(self.tokens) - self.steps

    def run(self, watch: Callable[[int], Watch] | None = None) -> Tensor:
        """The program's logits; `watch` gives, for a call's first place, what sees its nodes."""
        table = range(-(-len(self.tokens) // BLOCK))[::-1]
        names = [node.name for node in self.program.inputs()]
        caches, found = _empty_caches(self.program, len(table)), list[Tensor]()
        for start in (0, *range(self.prompt, len(self.tokens))):
            end = start + 1 if start else self.prompt
            rows = Rows(self.tokens[start:end], start, table)
            given = {**caches, **inputs([rows], BLOCK, CPU, True, names)}
            see = watch(start) if watch else None
            logits, *new = run_doubled(self.program, given, self.stored, see)
            caches = dict(zip(caches, new, strict=True))
            found.append(logits)
        return torch.cat(found)

    def first_difference(self) -> str:
        """The first value that differs, as near as the modules of the model can tell."""
        layers = {f"{self.original.layers}.{i}" for i in range(self.original.depth)}
        layer = self._first(layers) or ""
        inside = f"{self.original.layers}."
        leaves = {
            name
            for name, module in self.original.model.named_modules()
            if not list(module.children())
            and (name.startswith(f"{layer}.") or not name.startswith(inside))
        }
        return self._first(leaves) or layer or "what no module gives"

    def _first(self, names: set[str]) -> str | None:
        """The first of some modules that takes or gives something else than its like."""
        _, seen = self.original.run(self.tokens, names.__contains__)
        last = {str(n.meta.get("origin")): n for n in self.program.graph.nodes}
        found: list[str] = []

        def watch(start: int) -> Watch:
            def see(node: Node, value: Callable[[Node], Value]) -> None:
                for name, ours, theirs in _pairs(node, value, seen, last):
                    if not found and not _agree(ours, theirs, start):
                        found.append(name)

            return see

        self.run(watch)
        return found[0] if found else None


def _empty_caches(program: Program, blocks: int) -> dict[str, Value]:
    sizes = {size("N"): blocks, size("S"): BLOCK}
    return {
        cache.name: torch.zeros(
            [int(sizes.get(d, d)) for d in tensor_type(cache).shape],
            dtype=torch.float64,
        )
        for cache in program.caches()
    }


def _pairs(
    node: Node, value: Callable[[Node], Value], seen: ModuleValues, last: Mapping[str, Node]
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """What a call takes or gives beside what the module does that it is of, under a name."""
    origin = str(node.meta.get("origin"))
    if is_call(node, LINEAR) and origin in seen.took:
        taken = argument(node, 0)
        ours = value(taken)
        if isinstance(ours, Tensor):
            yield _taken(taken, origin), ours, [seen.took[origin]]
    ours = value(node)
    if last.get(origin) is node and origin in seen.gave and isinstance(ours, Tensor):
        yield origin, ours, seen.gave[origin]


def _taken(node: Node, origin: str) -> str:
    """What a linear takes, by a name of its own where it is what attention gives."""
    inner = node
    while is_call(inner, *MOVES):
        inner = argument(inner, 0)
    if not is_call(inner, ops.paged_attention):
        return f"what {origin} takes"
    scale, window = inner.args[6:8]
    return f"the attention of {inner.meta['origin']} (scale {scale:.4g}, window {window})"


def _agree(ours: Tensor, several: Sequence[Tensor], start: int) -> bool:
    """Whether one of several values is a call's, where they can be compared at all."""
    like = [(ours.squeeze(), part) for x in several if (part := _part(x, ours, start)) is not None]
    return not like or any(bool((a - b).abs().max() <= LIMIT * b.abs().max()) for a, b in like)


def _part(theirs: Tensor, ours: Tensor, start: int) -> Tensor | None:
    """What a value for all tokens has for those of a call; None where shapes say it is another."""
    if theirs.dim() != ours.dim() or not theirs.is_floating_point():
        return None
    for dim, count in enumerate(ours.shape):
        if theirs.shape[dim] != count:
            if start + count > theirs.shape[dim]:
                return None
            theirs = theirs.narrow(dim, start, count)
    return theirs.squeeze()
