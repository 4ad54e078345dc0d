"""One call of an NPU op: its tensors by type, as text, and its other arguments.

    op          npu_quantize
    arguments   {"input": "f16[T, 64]", "scales": "f32[64]", "dtype": 1}

The same text is a call in a program, of which the table of limits speaks, and tensors of seeded
numbers, on which an op runs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu.facts import Facts, facts
from kvc8.ir import npu
from kvc8.ir.program import Program
from kvc8.ir.text import parse
from kvc8.ir.types import DTYPES

TYPE = re.compile(r"(f32|f16|bf16|i64|i32|i8|b8|ints)\[(.*)\]")
SIZES = {"T": 3, "N": 8, "M": 2, "B": 2}  # S is the size of a block
EXPERTS = 8
MOST_NUMBERS = 1 << 20  # drawn for a tensor


@dataclass(frozen=True)
class SpelledCall:
    """A call as text; `arguments` by the names of the op's schema."""

    op: str
    arguments: Mapping[str, Any]
    block_size: int = 128

    @property
    def overload(self) -> OpOverload:
        """The op itself."""
        name = self.op.replace("_npu_", "atb_", 1) if self.op.startswith("_") else self.op
        found: OpOverload = getattr(npu, name)
        return found

    def types(self) -> dict[str, str]:
        """The arguments that are tensors or lists of numbers."""
        return {k: v for k, v in self.arguments.items() if isinstance(v, str) and TYPE.fullmatch(v)}

    def changed(self, changes: Mapping[str, Any], block_size: int | None = None) -> "SpelledCall":
        """The call with other arguments; None leaves one out."""
        arguments = {k: v for k, v in {**self.arguments, **changes}.items() if v is not None}
        return SpelledCall(self.op, arguments, block_size or self.block_size)


def program_of(call: SpelledCall) -> Program:
    """A program that makes the call and nothing else."""
    types = call.types()
    head = ", ".join(f"{name}: {type_}" for name, type_ in types.items())
    program = parse(f"def lowered({head}):\n    return [{next(iter(types))}]")
    nodes = dict(zip(types, program.inputs(), strict=True))
    args, kwargs = placed(call, {**call.arguments, **nodes})
    output = next(iter(reversed(program.graph.nodes)))
    program.call(output, call.overload, *args, kwargs=kwargs, name="call")
    return program


def placed(call: SpelledCall, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Values by name as an op takes them: by position and by keyword, lists as lists.

    What an op must be given and the values do not have is None.
    """
    arguments = call.overload._schema.arguments
    lists = {a.name for a in arguments if "List[Tensor]" in str(a.type)}
    given = {name: [x] if name in lists else x for name, x in values.items()}
    given |= {a.name: None for a in arguments if not a.has_default_value() and a.name not in given}
    order = [a.name for a in arguments if not a.kwarg_only]
    return [given.pop(name) for name in takewhile(given.__contains__, order)], given


def call_of(program: Program) -> Node:
    """The one call of `program_of`."""
    found: Node = next(n for n in reversed(program.graph.nodes) if n.op == "call_function")
    return found


def facts_of(call: SpelledCall) -> Facts:
    """What the table of limits may speak of."""
    return facts(call_of(program_of(call)), call.block_size)


def tensors(call: SpelledCall, seed: int = 0) -> dict[str, Any]:
    """The arguments with seeded numbers in place of types."""
    random = torch.Generator().manual_seed(seed)
    values, schema = dict(call.arguments), call.overload._schema.arguments
    for name, type_ in call.types().items():
        values[name] = _value(call, name, type_, random)
    if "block_table" in values and any(a.name == "block_size" for a in schema):
        values.setdefault("block_size", call.block_size)
    return values


def _value(call: SpelledCall, name: str, type_: str, random: torch.Generator) -> Any:
    match = TYPE.fullmatch(type_)
    assert match is not None
    shape = tuple(_size(d, call.block_size) for d in match[2].split(",") if d.strip())
    if match[1] == "ints":
        return _lengths(call, name, shape[0])
    dtype = DTYPES[match[1]]
    for names, make in BY_NAME.items():
        if name in names:
            return make(shape, random, call).to(dtype)
    if "scale" in name:
        return _scale(shape, dtype, random)
    if "offset" in name or "zero_point" in name:
        return torch.randint(-8, 8, shape, generator=random).to(dtype)
    if dtype is torch.int32:
        return torch.randint(-1000, 1000, shape, generator=random, dtype=dtype)
    few = min(prod(shape), MOST_NUMBERS)  # which are repeated in a large tensor
    if not dtype.is_floating_point:
        numbers = torch.randint(-128, 128, (few,), generator=random).to(dtype)
    else:
        numbers = torch.randn(few, generator=random).to(dtype)
    return numbers.repeat(-(-prod(shape) // max(few, 1)))[: prod(shape)].reshape(shape)


def _size(text: str, block_size: int) -> int:
    sizes = {**SIZES, "S": block_size}
    return prod(sizes.get(part) or int(part) for part in text.strip().split("*"))


def _scale(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    made = torch.rand(shape, generator=random) / 50 + 0.01
    return made.view(torch.int32).long() if dtype is torch.int64 else made.to(dtype)


def _lengths(call: SpelledCall, name: str, count: int) -> list[int]:
    """Cumulative where rows of sequences lie end to end, and of each else."""
    if call.arguments.get("input_layout") == "TND" and "block_table" not in call.arguments:
        query = TYPE.fullmatch(str(call.arguments.get("query")))
        rows = _size(query[2].split(",")[0], call.block_size) if query else SIZES["T"]
        return [1, rows][-count:]
    return _context(count, call).tolist()


def _context(count: int, call: SpelledCall) -> Tensor:
    """One token, one into a second block, and all; all of each where the table says how many."""
    table = TYPE.fullmatch(str(call.arguments.get("block_table")))
    width = table[2].split(",")[-1].strip() if table else "M"
    if width.isdecimal():
        return torch.full((count,), int(width) * call.block_size)
    return torch.tensor([1, call.block_size + 1, SIZES["M"] * call.block_size])[:count]


def _slots(shape: tuple[int, ...], random: torch.Generator, call: SpelledCall) -> Tensor:
    places = torch.randperm(_cache_blocks(call) * call.block_size, generator=random)
    return places[: prod(shape)].reshape(shape)


def _blocks(shape: tuple[int, ...], random: torch.Generator, call: SpelledCall) -> Tensor:
    return torch.randperm(_cache_blocks(call), generator=random)[: prod(shape)].reshape(shape)


def _cache_blocks(call: SpelledCall) -> int:
    names = ("key_cache", "k_cache", "key")
    cache = next(
        (TYPE.fullmatch(str(call.arguments[n])) for n in names if n in call.arguments), None
    )
    return _size(cache[2].split(",")[0], call.block_size) if cache else SIZES["N"]


Maker = Callable[[tuple[int, ...], torch.Generator, SpelledCall], Tensor]
BY_NAME: Mapping[tuple[str, ...], Maker] = {
    ("block_table",): _blocks,
    ("context_lens",): lambda shape, _, call: _context(shape[0], call),
    ("slot_mapping", "slot_indices", "indices", "index"): _slots,
    ("atten_mask",): lambda shape, *_: torch.ones(shape, dtype=torch.bool).triu(1),
    ("cos", "r1"): lambda shape, random, _: torch.randn(shape, generator=random).cos(),
    ("sin", "r2"): lambda shape, random, _: torch.randn(shape, generator=random).sin(),
    ("out", "y", "q_out"): lambda shape, *_: torch.zeros(shape),
    ("probs",): lambda shape, random, _: torch.rand(shape, generator=random),
    ("expert_idx",): lambda shape, random, _: torch.randint(0, EXPERTS, shape, generator=random),
    ("sorted_indices",): lambda shape, random, _: torch.randperm(shape[0], generator=random),
    ("group_list",): lambda shape, *_: torch.tensor([SIZES["T"]] + [0] * (shape[0] - 1)),
}
