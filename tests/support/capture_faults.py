"""Ten faults of a capture, each planted in a captured program, or in capture itself."""

from collections.abc import Callable

import torch
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.expression import Expression, make, stored
from kvc8.ir.precision.doubled import LINEAR
from kvc8.ir.program import Program, argument, expression_of, tensor_type

ATEN = torch.ops.aten
LAYER = "model.layers.1."
LAST = 2**63 - 1
Fault = Callable[[Program], None]


def _here(program: Program, *targets: object, within: str = "") -> list[Node]:
    """The calls of ops in layer 1, or in a module of it."""
    return [n for n in program.calls(*targets) if n.meta["origin"].startswith(LAYER + within)]


def _attention(program: Program) -> Node:
    [found] = _here(program, ops.paged_attention)
    return found


def window_ignored(program: Program) -> None:
    """Layer 1 sees all tokens."""
    call = _attention(program)
    assert call.args[7]
    call.update_arg(7, 0)


def scale(program: Program) -> None:
    """The logits of layer 1 are a hundredth too large."""
    call = _attention(program)
    call.update_arg(6, call.args[6] * 1.01)


def gqa_repeat(program: Program) -> None:
    """Query heads take their key heads by turns, and should take them in groups."""
    call = _attention(program)
    q = argument(call, 0)
    (_, heads, dim), kv = tensor_type(q).shape, tensor_type(argument(call, 1)).shape[2]
    assert 1 < kv < heads
    call.update_arg(0, _turned(program, call, q, (heads // kv, kv), int(dim)))
    out = _turned(program, call.next, call, (kv, heads // kv), int(dim))
    inner = {out, *(n for n in program.graph.nodes if call.name in map(str, n.all_input_nodes))}
    for user in list(call.users):
        if user not in inner:
            user.replace_input_with(call, out)


def _turned(program: Program, before: Node, x: Node, split: tuple[int, int], dim: int) -> Node:
    """The heads of x [T, A*B, D] in the order of [B, A]."""
    a, b = split
    apart = program.call(before, ATEN.reshape.default, x, [-1, a, b, dim])
    turned = program.call(before, ATEN.transpose.int, apart, 1, 2)
    return program.call(before, ATEN.reshape.default, turned, [-1, a * b, dim])


def rope_base(program: Program) -> None:
    """Frequencies of another base: each is raised to a power."""
    [node] = [n for n in program.parameters() if n.name.endswith("inv_freq")]
    frequencies = make(expression_of(node), lambda name: torch.empty(0))
    node.meta["expression"] = _written(frequencies**1.1)


def _written(tensor: torch.Tensor) -> Expression:
    return Expression("values", (tuple(tensor.tolist()), tensor.dtype))


def interleaving(program: Program) -> None:
    """RoPE takes neighbors for pairs, and should take the halves of a head."""
    found = _here(program, ATEN.slice.Tensor, within="self_attn")
    first, second = found[:2]
    half = int(tensor_type(first).shape[-1])
    assert (first.args[1:4], second.args[1:4]) == ((3, 0, half), (3, half, LAST))
    first.args = (*first.args[:2], 0, LAST, 2)
    second.args = (*second.args[:2], 1, LAST, 2)


def position_shift(program: Program) -> None:
    """From place 6 on each token stands one further than it does."""
    [positions] = [n for n in program.inputs() if n.name == "positions"]
    users = list(positions.users)
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    late = program.call(first, ATEN.ge.Scalar, positions, 6)
    moved = program.call(first, ATEN.add.Tensor, positions, late)
    for user in users:
        user.replace_input_with(positions, moved)


def norm_epsilon(program: Program) -> None:
    """The first norm of layer 1 adds ten times what it should."""
    call, *_ = _here(program, ATEN.add.Tensor, within="input_layernorm")
    assert isinstance(call.args[1], float)
    call.update_arg(1, call.args[1] * 10)


def bias(program: Program) -> None:
    """A linear of layer 1 leaves out its bias."""
    call, *_ = _here(program, LINEAR, within="self_attn.q_proj")
    assert len(call.args) == 3
    call.args = call.args[:2]


def tied_head(program: Program) -> None:
    """The head is the embedding, and has a weight of its own."""
    [node] = [n for n in program.parameters() if n.name == "lm_head_weight"]
    node.meta["expression"] = stored("model.embed_tokens.weight")


# By name: the fault, a kind of tests/conftest.py to plant it in, and the first value that differs.
ATTENTION = "the attention of model.layers.1.self_attn"
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "window ignored": (window_ignored, "mistral", f"{ATTENTION} (scale 0.25, window 0)"),
    "scale": (scale, "llama", f"{ATTENTION} (scale 0.2525, window 0)"),
    "gqa repeat": (gqa_repeat, "llama", f"{ATTENTION} (scale 0.25, window 0)"),
    "rope base": (rope_base, "llama", "model.rotary_emb"),
    "interleaving": (interleaving, "llama", f"{ATTENTION} (scale 0.25, window 0)"),
    "position shift": (position_shift, "llama", "model.rotary_emb"),
    "norm epsilon": (norm_epsilon, "llama", "model.layers.1.input_layernorm"),
    "bias": (bias, "qwen2", "model.layers.1.self_attn.q_proj"),
    "tied head": (tied_head, "llama", "lm_head"),
}
