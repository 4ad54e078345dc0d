"""Rotate a model so that int8 fits it better. It computes what it did, at the same cost.

In float, a rotation of the residual stream changes nothing: what writes to it is multiplied by an
orthogonal R, what reads it by R's inverse, and an RMSNorm between them commutes with R once its
weight is folded into the linears that read it. A language model's stream has a few channels that
are hundreds of times larger than the others. They are spread over all channels, and a static
per-tensor int8 scale then loses little (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024).
In the same way V is turned within each head between v_proj and o_proj, which serves V's cache and
o_proj's input.

    an embedding, lm_head                   W R, lm_head with the last norm's weight folded in
    q_proj k_proj gate_proj up_proj         W diag(norm) R
    v_proj                                  Rhᵀ W diag(norm) R       Rh in each head
    a router, and experts' likewise         W diag(norm) R
    o_proj                                  Rᵀ W Rh
    down_proj, experts' too                 Rᵀ W
    biases of v_proj; o_proj, down_proj     Rhᵀ b; Rᵀ b
    norms, by w or by 1 + w                 1; 0

A tied lm_head has to be untied, for only it takes the last norm's weight: the model grows by one
embedding. What is turned is found in the captured program (stream.py, heads.py), so an architecture
is rotated whose structure allows it, whatever it is called. Where the stream does not allow it, V
is turned all the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.checkpoint.reader import Checkpoint, StoredTensor, open_checkpoint
from kvc8.ir.checkpoint.unmapped import load, row_blocks
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import cast, stored
from kvc8.ir.program import Program, argument, expression_of, is_parameter, tensor_type
from kvc8.tools.quantizer.sites import LINEAR
from kvc8.tools.quantizer.transforms.heads import find_heads
from kvc8.tools.quantizer.transforms.orthogonal import ROWS, Orthogonal, random_orthogonal
from kvc8.tools.quantizer.transforms.roles import NotTurned, Roles, Turn, where
from kvc8.tools.quantizer.transforms.stream import find_stream, width
from kvc8.tools.quantizer.writer import Entry, write_json, write_tensors

Read = Callable[[str], Tensor]  # a stored tensor by name


@dataclass(frozen=True)
class Rotation:
    """What is turned: the residual stream, if it is, and V within each head."""

    roles: Roles
    residual: Orthogonal | None
    heads: Mapping[int, Orthogonal]  # by a head's channels
    why: str | None = None  # the stream is not turned, where it was asked for


def find_rotation(
    program: Program, residual: bool, seed: int, coarse: bool = False
) -> Rotation | str:
    """The rotation of a float model, by its captured program, or why nothing of it is rotated.

    Without `residual` what is turned stays float, and has to be stored as precisely as it was:
    bfloat16's rounding would cost more than int8 gains by it.
    """
    found, why = Roles(program), None
    if not residual and coarse:
        return "bfloat16 would round what is turned"
    if residual:
        found, why = _of_stream(program)
    in_heads = find_heads(program, found)
    if not found.turns:
        return why or in_heads or "it has nothing to turn"
    sizes = {turn.head for turns in found.turns.values() for turn in turns if turn.head}
    heads = {size: random_orthogonal(size, seed + 1) for size in sizes}
    turned = residual and why is None
    stream = random_orthogonal(width(program), seed) if turned else None
    return Rotation(found, stream, heads, why)


def _of_stream(program: Program) -> tuple[Roles, str | None]:
    """What turns the stream; nothing, and why, where it cannot be turned."""
    found = Roles(program)
    try:
        find_stream(program, found)
        found.check()
    except NotTurned as stuck:
        return Roles(program), str(stuck)
    return found, None


def turned(name: str, read: Read, rotation: Rotation) -> Tensor:
    """A tensor of the rotated model, in the dtype of the stored one, rounded once."""
    roles = rotation.roles
    value = read(roles.untied.get(name, name))
    dtype = value.dtype
    if name in roles.norms:
        return torch.full_like(value, roles.norms[name])
    turns = roles.turns.get(name, [])
    # Several turns may meet in a linear; an embedding has one, and is too large for float32.
    if len(turns) > 1 and dtype is not torch.float64:
        value = value.float()
    for turn in turns:
        value = _turned(value, turn, read, rotation)
    return value.to(dtype)


def _turned(value: Tensor, turn: Turn, read: Read, rotation: Rotation) -> Tensor:
    if turn.axis == -2:
        across = replace(turn, axis=-1)
        return _turned(value.transpose(-1, -2), across, read, rotation).transpose(-1, -2)
    if turn.span is not None:
        start, size = turn.span
        parts = value.split([start, size, value.shape[-1] - start - size], -1)
        inner = _turned(parts[1], replace(turn, span=None), read, rotation)
        return torch.cat([parts[0], inner, parts[2]], -1)
    if turn.head is not None:
        by_head = value.unflatten(-1, (-1, turn.head))
        return rotation.heads[turn.head].turn(by_head).flatten(-2)
    assert rotation.residual is not None
    scale = None if turn.norm is None else read(turn.norm.name) + turn.norm.plus
    return rotation.residual.turn(value, scale)


def rotate(checkpoint: Checkpoint, rotation: Rotation, directory: Path) -> Checkpoint:
    """Write the rotated float model to a directory, and open it; one tensor is held at a time.

    A directory that is there already is taken to be that model. The result keeps the path of what
    it was made from, by which messages name it. Raises ModelError for a number that the stored
    dtype cannot hold.
    """
    if not directory.exists():
        _write(checkpoint, rotation, directory)
    return replace(open_checkpoint(directory), path=checkpoint.path)


def _write(checkpoint: Checkpoint, rotation: Rotation, directory: Path) -> None:
    new = directory.with_name(f"{directory.name}.new")
    new.mkdir(exist_ok=True)
    sources = dict(checkpoint.tensors)
    for head, table in rotation.roles.untied.items():
        sources[head] = replace(sources[table], name=head)
    floats = {name: t for name, t in sources.items() if t.dtype.is_floating_point}
    entries = [Entry(name, t.dtype, t.shape, "FLOAT") for name, t in floats.items()]
    tensors = ((name, part) for name in floats for part in _sound(name, floats, rotation))
    write_tensors(new / "model.safetensors", entries, tensors)
    untied = {"tie_word_embeddings": False} if rotation.roles.untied else {}
    write_json(new / "config.json", {**checkpoint.config, **untied})
    new.rename(directory)


def untie(program: Program, rotation: Rotation) -> None:
    """Make a captured program that of the rotated model: a tied head has a tensor of its own."""
    for call in program.calls(LINEAR):
        head, shared = f"{where(call)}.weight", argument(call, 1)
        if head not in rotation.roles.untied or not is_parameter(shared):
            continue
        type_, own = tensor_type(shared), stored(head)
        if expression_of(shared).op == "cast":
            own = cast(own, type_.dtype)
        made = program.placeholder(head.replace(".", "_"), type_, own)
        call.replace_input_with(shared, made)


def untied_bytes(before: Checkpoint, after: Checkpoint) -> int:
    """By how much a rotated model is larger than what it was made from."""
    a, b = (sum(t.nbytes for t in x.tensors.values()) for x in (before, after))
    return b - a


def _sound(name: str, stored: Mapping[str, StoredTensor], rotation: Rotation) -> Iterator[Tensor]:
    """A tensor of the rotated model, in parts of its rows where each is turned by itself."""
    source = rotation.roles.untied.get(name, name)
    for part in _parts(stored[source], rotation.roles.turns.get(name, [])):

        def read(other: str, part: Tensor = part) -> Tensor:
            return part if other == source else load(stored[other])

        made = turned(name, read, rotation)
        low, high = torch.aminmax(made)  # a NaN is both; and no mask as large as an embedding
        if not bool(low.isfinite() & high.isfinite()):
            raise ModelError(name, "is not finite when it is rotated", "use --rotate off")
        yield made


def _parts(stored: StoredTensor, turns: Sequence[Turn]) -> Iterator[Tensor]:
    """An embedding is not held whole; its parts end where those end that are turned at once."""
    if len(stored.shape) != 2 or any(turn.axis != -1 for turn in turns):
        yield load(stored)
        return
    yield from row_blocks(stored, 4 * ROWS * (stored.nbytes // max(stored.shape[0], 1)))
