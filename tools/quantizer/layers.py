"""Cut a captured program into decoder layers, and run one of them on one whole text.

A text is run as a prompt of its own: attention sees the rows of K and V directly, as many as the
text has tokens, so no cache is allocated. What a layer passes on are the values that later layers
use: the residual stream, and what all layers share (RoPE's tables).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from kvc8.ir import mixture_ops, ops
from kvc8.ir.checkpoint.layouts import layer_index
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.unmapped import load, rows
from kvc8.ir.expression import make, stored_names
from kvc8.ir.program import (
    Program,
    argument,
    expression_of,
    is_call,
    is_parameter,
    substitute,
    tensor_type,
    type_of,
)
from kvc8.ir.run import Value
from kvc8.ir.types import TensorType

EMBEDDING = torch.ops.aten.embedding.default
Values = Mapping[Node, Tensor]
# What a call gives, from its arguments with values in the place of nodes.
Evaluate = Callable[[Node, Sequence[Value], Mapping[str, Value]], Value]


@dataclass(frozen=True)
class LayerCalls:
    """A layer's calls, or those before the first layer, and what they need and pass on."""

    layer: int | None
    calls: Sequence[Node]
    parameters: Sequence[Node]  # but for embeddings and experts, read as they are needed
    keeps: Sequence[Node]  # the values, of this or an earlier stage, that later ones use
    dies: Mapping[Node, Sequence[Node]]  # after each call, what nobody needs any more


def stages(program: Program) -> list[LayerCalls]:
    """What stands before the layers, then each layer; what comes after the last is left out."""
    made: list[tuple[int | None, list[Node]]] = [(None, [])]
    ends = [0]
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        layer = _layer(node)
        if layer is not None and layer != made[-1][0]:
            made.append((layer, []))
            ends.append(0)
        made[-1][1].append(node)
        if layer is not None:
            ends[-1] = len(made[-1][1])
    made[-1] = (made[-1][0], made[-1][1][: ends[-1]])
    at = {node: i for i, (_, calls) in enumerate(made) for node in calls}
    last = {node: max((at.get(user, -1) for user in node.users), default=-1) for node in at}
    return [_stage(i, layer, calls, at, last) for i, (layer, calls) in enumerate(made)]


def _layer(node: Node) -> int | None:
    return layer_index(str(node.meta.get("origin", "")).split("."))


def _stage(
    index: int,
    layer: int | None,
    calls: Sequence[Node],
    at: Mapping[Node, int],
    last: Mapping[Node, int],
) -> LayerCalls:
    tables = {argument(node, 0) for node in calls if is_call(node, EMBEDDING)}
    tables |= {argument(node, 1) for node in calls if streamed(node)}
    used = dict.fromkeys(n for call in calls for n in call.all_input_nodes if is_parameter(n))
    keeps = [node for node in at if at[node] <= index < last[node]]
    dies: dict[Node, list[Node]] = {}
    seen = set(keeps)
    for call in reversed(calls):
        for node in [call, *call.all_input_nodes]:
            if node in at and node not in seen:
                dies.setdefault(call, []).append(node)
                seen.add(node)
    return LayerCalls(layer, calls, [n for n in used if n not in tables], keeps, dies)


def weights_of(stage: LayerCalls, checkpoint: Checkpoint) -> dict[Node, Tensor]:
    """Read a stage's parameters into memory, in the dtypes that the program computes in."""
    stored = checkpoint.tensors
    return {n: make(expression_of(n), lambda name: load(stored[name])) for n in stage.parameters}


@torch.no_grad()
def run_stage(
    stage: LayerCalls, weights: Values, values: Values, tokens: Sequence[int], evaluate: Evaluate
) -> dict[Node, Tensor]:
    """Run a stage on one text; gives the values that it keeps.

    `weights` has its parameters and `values` what the stage before it kept.
    """
    env: dict[Node, Value] = {**weights, **{node: _plain(node, t) for node, t in values.items()}}
    for call in stage.calls:
        args = [substitute(arg, lambda n: _value(n, env, tokens)) for arg in call.args]
        kwargs = {
            name: substitute(arg, lambda n: _value(n, env, tokens))
            for name, arg in call.kwargs.items()
        }
        env[call] = evaluate(call, args, kwargs)
        for node in stage.dies.get(call, ()):
            env.pop(node, None)
    kept = ((node, env[node]) for node in stage.keeps)
    return {node: v if isinstance(v, Tensor) else torch.tensor(v) for node, v in kept}


def _plain(node: Node, value: Tensor) -> Value:
    """A whole number is passed on as a tensor."""
    return value if isinstance(type_of(node), TensorType) else int(value)


def _value(node: Node, env: Mapping[Node, Value], tokens: Sequence[int]) -> Value:
    """The value of an argument; caches, block tables and the like have none here."""
    if node.name == "input_ids" and node.op == "placeholder":
        return torch.tensor(tokens)
    if node.name == "positions" and node.op == "placeholder":
        return torch.arange(len(tokens))
    return env.get(node)


def plain(checkpoint: Checkpoint, attend: Evaluate) -> Evaluate:
    """Evaluate calls as a program means them, with `attend` for paged_attention.

    Its k and v are rows [T, heads, head_dim] of the text.
    """

    def evaluate(call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        if is_call(call, ops.cache_write):
            return args[1]
        if is_call(call, ops.paged_attention):
            return attend(call, args, kwargs)
        if is_call(call, EMBEDDING):
            return embedded(checkpoint, argument(call, 0), args[1])
        if streamed(call):
            return _by_expert(checkpoint, argument(call, 1), args)
        assert callable(call.target)
        return call.target(*args, **kwargs)

    return evaluate


def embedded(checkpoint: Checkpoint, table: Node, tokens: Value) -> Tensor:
    """The rows of an embedding that belong to tokens; the rest of it is never read."""
    assert isinstance(tokens, Tensor)
    stored, flat = checkpoint.tensors, tokens.flatten()
    found = make(expression_of(table), lambda name: rows(stored[name], flat))
    whole: Tensor = found.unflatten(0, tokens.shape)
    return whole


def streamed(call: Node) -> bool:
    """Whether a call is of experts that are stored one by one, of which each is read by itself."""
    if not is_call(call, mixture_ops.grouped_linear) or not is_parameter(argument(call, 1)):
        return False
    return len(list(stored_names(expression_of(argument(call, 1))))) > 1


def _by_expert(checkpoint: Checkpoint, weight: Node, args: Sequence[Value]) -> Tensor:
    """What kvc8.grouped_linear gives, with one expert at a time in memory, if a row wants it."""
    rows, _, bias, counts = args
    assert isinstance(rows, Tensor)
    assert isinstance(counts, Tensor)
    names, type_ = list(stored_names(expression_of(weight))), tensor_type(weight)
    out, start = rows.new_empty(len(rows), int(type_.shape[1])), 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            parts = [load(checkpoint.tensors[n]) for n in names[expert :: len(counts)]]
            made = rows[start : start + count] @ torch.cat(parts).to(type_.dtype).t()
            out[start : start + count] = made + bias[expert] if isinstance(bias, Tensor) else made
        start += count
    return out


@dataclass(frozen=True)
class AttentionSettings:
    """What kvc8.paged_attention takes beside tensors of a batch."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


def attention_settings(args: Sequence[Value], kwargs: Mapping[str, Value]) -> AttentionSettings:
    """The settings among the arguments of a call of paged_attention."""
    names = ("scale", "window", "softcap", "sinks")
    given = {**dict(zip(names, args[6:], strict=False)), **kwargs}
    return AttentionSettings(**given)  # type: ignore[arg-type]


def attend_in_float32(_: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    """Attention of a text over itself as kvc8.paged_attention defines it."""
    given = [x for x in args[:3] if isinstance(x, Tensor)]
    q, k, v = (x.float() for x in given)
    tokens, at = len(q), attention_settings(args, kwargs)
    if at.softcap or at.sinks is not None:
        mask = ops.causal_mask(tokens, tokens, at.window)
        return ops.attend(q, k, v, mask, at.scale, at.softcap, at.sinks).to(given[0].dtype)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
    seen = ops.causal_mask(tokens, tokens, at.window) if 0 < at.window < tokens else None
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=at.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(given[0].dtype)
