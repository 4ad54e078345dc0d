"""Measure a captured program on texts: the range of each linear's input, and how far K and V reach.

K is measured where the cache receives it, after RoPE; msModelSlim measures it before, and clips.
Only what is measured is computed, and a parameter is read when it is first used and let go after
its last use, so that what this takes does not grow with the number of layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.checkpoint import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.layouts import layer_index
from kvc8.ir.model_files import place, shown
from kvc8.ir.program import Program, argument, is_cache, is_parameter, recipe_of, tensor_type
from kvc8.ir.recipe import make, stored_names
from kvc8.ir.run import Value, run
from kvc8.ir.safetensors_files import StoredTensor
from kvc8.ir.types import size
from kvc8.ir.w8a8 import Range, finite

LINEAR = torch.ops.aten.linear.default
Report = Callable[[int, str], None]  # tokens measured so far, and the layer at work


@dataclass(frozen=True)
class Site:
    """A linear that can be quantized: its module, and the node whose value it reads."""

    module: str
    source: Node


@dataclass
class Statistics:
    """The range of each node that a linear reads, and the absmax of each cache's rows."""

    inputs: dict[Node, Range] = field(default_factory=dict)
    rows: dict[Node, Tensor] = field(default_factory=dict)  # float32 [heads * head_dim]


def sites(program: Program) -> list[Site]:
    """The linears inside of layers whose weight is a stored tensor that nothing else uses.

    lm_head is in no layer, and stays float as msModelSlim leaves it.
    """
    found = []
    for linear in program.calls(LINEAR):
        weight = argument(linear, 1)
        names = list(stored_names(recipe_of(weight))) if is_parameter(weight) else []
        module, _, part = names[0].rpartition(".") if len(names) == 1 else ("", "", "")
        inside = layer_index(module.split(".")) is not None
        if inside and part == "weight" and len(weight.users) == 1:
            found.append(Site(module, argument(linear, 0)))
    return found


def load(tensor: StoredTensor) -> Tensor:
    """Read a stored tensor into memory of its own.

    Checkpoint.read maps it, and what is mapped stays resident long after it was used: a run over
    all weights would then seem to need as much memory as the model has.
    """
    held = bytearray(tensor.nbytes)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            got = file.readinto(held)
    except OSError as error:
        raise ModelError(
            f"{place(tensor.file)}: cannot be read ({shown(error.strerror)}); check its rights"
        ) from error
    if got != tensor.nbytes:
        raise ModelError(f"{place(tensor.file)}: has become shorter; copy the file again")
    if not held:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.frombuffer(held, dtype=tensor.dtype).reshape(tensor.shape)


def vocabulary(program: Program) -> int:
    """How many tokens the program knows."""
    tables = [argument(node, 0) for node in program.calls(torch.ops.aten.embedding.default)]
    return min(int(tensor_type(table).shape[0]) for table in tables)


def calibrate(
    program: Program,
    checkpoint: Checkpoint,
    texts: Sequence[Sequence[int]],
    most: int,
    report: Report,
) -> Statistics:
    """Run the program on texts, as many at a time as have `most` tokens, and measure.

    Raises ModelError where a value is infinite or no number.
    """
    seen = Statistics()
    watched = {site.source for site in sites(program)}
    caches = {argument(write, 1): argument(write, 0) for write in program.calls(ops.cache_write)}
    small, matching = _measuring(program, {*watched, *caches})
    done = 0

    def observe(node: Node, value: Value) -> None:
        original = matching.get(node)
        if original is None or not isinstance(value, Tensor):
            return
        if original in watched:
            _widen(seen, original, value)
            report(done, str(original.meta.get("origin", "")))
        if original in caches:
            _raise(seen, caches[original], value)

    for step in _steps(texts, most):
        run(small, _Values(small, checkpoint, _inputs(step)), observe)
        done += sum(map(len, step))
    return seen


def _widen(seen: Statistics, node: Node, value: Tensor) -> None:
    low, high = (float(end) for end in torch.aminmax(value))
    new = Range(low, high)
    if not finite(new):
        raise ModelError(
            f"{node.meta.get('origin') or node.name}: gives a value that is not finite; "
            "check the model's weights"
        )
    old = seen.inputs.get(node, new)
    seen.inputs[node] = Range(min(old.low, low), max(old.high, high))


def _raise(seen: Statistics, cache: Node, rows: Tensor) -> None:
    top = rows.abs().amax(0).flatten().float()
    if not math.isfinite(float(top.max())):
        raise ModelError(
            f"{cache.name}: gets a value that is not finite; check the model's weights"
        )
    seen.rows[cache] = top.maximum(seen.rows[cache]) if cache in seen.rows else top


def _measuring(program: Program, wanted: set[Node]) -> tuple[Program, dict[Node, Node]]:
    """A program that computes what is wanted only; gives too which node each of them copies.

    Its parameters and caches stand directly before their first use, where run() asks for them.
    """
    small = program.copy()
    copies = dict(zip(small.graph.nodes, program.graph.nodes, strict=True))
    needed = {node for node, original in copies.items() if original in wanted}
    for node in reversed(list(small.graph.nodes)):
        if node in needed:
            needed |= set(node.all_input_nodes)
        else:
            small.graph.erase_node(node)
    left = {*small.parameters(), *small.caches()}
    for node in small.graph.nodes:
        for used in left.intersection(node.all_input_nodes):
            node.prepend(used)
            left.remove(used)
    small.graph.output([])
    return small, {node: original for node, original in copies.items() if original in wanted}


def _steps(texts: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Texts in their order, as many at a time as have `most` tokens together."""
    step: list[Sequence[int]] = []
    for text in texts:
        if step and sum(map(len, step)) + len(text) > most:
            yield step
            step = []
        step.append(text)
    if step:
        yield step


def _inputs(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A step of whole texts; each has one block, as large as the longest of them."""
    lengths = [len(text) for text in texts]
    block, i32 = max(lengths), torch.int32
    slots = [i * block + p for i, length in enumerate(lengths) for p in range(length)]
    return {
        "input_ids": torch.tensor([token for text in texts for token in text]),
        "positions": torch.tensor([p for length in lengths for p in range(length)]),
        "slot_mapping": torch.tensor(slots, dtype=i32),
        "block_table": torch.arange(len(texts), dtype=i32)[:, None],
        "seq_lens": torch.tensor(lengths, dtype=i32),
        "query_starts": torch.tensor([0, *lengths]).cumsum(0).to(i32),
        "logits_rows": torch.tensor([0]),
    }


class _Values(Mapping[str, Value]):
    """What run() takes for each placeholder: parameters and caches are made when asked for."""

    def __init__(
        self, program: Program, checkpoint: Checkpoint, step: Mapping[str, Tensor]
    ) -> None:
        self._step, self._stored = step, checkpoint.tensors
        self._made = {node.name: node for node in [*program.parameters(), *program.caches()]}
        self._sizes = {size("N"): len(step["seq_lens"]), size("S"): int(step["seq_lens"].max())}

    def __getitem__(self, name: str) -> Value:
        if name in self._step:
            return self._step[name]
        node = self._made[name]
        if not is_cache(node):
            return make(recipe_of(node), lambda stored: load(self._stored[stored]))
        type_ = tensor_type(node)
        return torch.zeros([self._sizes.get(d, d) for d in type_.shape], dtype=type_.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._step, *self._made])

    def __len__(self) -> int:
        return len(self._step) + len(self._made)
