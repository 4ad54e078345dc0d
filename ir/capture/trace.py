"""A model directory as a program: traced once for each kind of layer, and stamped out.

transformers builds the model without data and runs it with an attention of ours, which leaves one
call of `kvc8.attention_site` a layer; torch.export records the run. Two layers of each kind are
traced, and the others are copies of those, where ir/capture/stamp.py proves that they are alike.
In the program each site becomes two `kvc8.cache_write` and a `kvc8.paged_attention`.

A captured program takes the tokens of a batch end to end, so that one program serves prefill,
decode and any mixture:

    input_ids     i64[T]      tokens                  block_table   i32[B, M]   pages of a sequence
    positions     i64[T]      place in its sequence   seq_lens      i32[B]      tokens, new included
    slot_mapping  i32[T]      where K and V go, or -1 query_starts  i32[B + 1]  first row of each
    logits_rows   i64[R]      tokens to give logits for

and k_cache_i, v_cache_i [N, S, H, D] of each layer; it gives logits [R, vocabulary] and the caches.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

from kvc8.ir.capture import attention
from kvc8.ir.capture.accounts import account, add_norm_biases
from kvc8.ir.capture.build import (
    build,
    config_dtype,
    layers,
    layers_path,
    model_config,
    of_each_layer,
    reduced,
)
from kvc8.ir.capture.canonical import CHECKS
from kvc8.ir.capture.foreign import FOREIGN, first_line, quiet
from kvc8.ir.capture.from_export import PRESENT, Emitter, Trace, attention_site
from kvc8.ir.capture.functional import functional
from kvc8.ir.capture.parameters import check_kv_scales
from kvc8.ir.capture.stamp import Cut, alike, cut, kinds, layer_of, representatives
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program, is_call
from kvc8.ir.verify import verify

ATEN = torch.ops.aten
NUMBERS = (ATEN.item.default, ATEN._local_scalar_dense.default)


class _Flat(torch.nn.Module):
    """The model on flattened tokens, told that all of them are there.

    Not told so, it would take tokens out of the order of their places for several sequences, and
    make a mask of that.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(
        self, input_ids: Tensor, positions: Tensor, logits_rows: Tensor, present: Tensor
    ) -> Tensor:
        given = {
            "input_ids": input_ids[None],
            "position_ids": positions[None],
            "attention_mask": present[None],
        }
        logits: Tensor = self.m(**given, use_cache=False, logits_to_keep=logits_rows).logits
        return logits[0]


def capture(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, stamped: bool = True
) -> Program:
    """Capture a checkpoint as a program at stage CAPTURED, computing in `dtype`.

    `dtype` is config.json's where none is given. Without `stamped` each layer is traced, which
    takes minutes for a large model and gives the same program. Raises ModelError where
    transformers does not know the model or its attention cannot be found.
    """
    for warning in check_kv_scales(checkpoint):
        warnings.warn(warning, stacklevel=2)
    config = model_config(checkpoint)
    model = build(config, dtype or config_dtype(checkpoint))
    path = layers_path(model, config)
    kind_of = kinds(layers(model, path), of_each_layer(config))
    chosen = representatives(kind_of)
    fewer = stamped and len(chosen) < len(kind_of)
    small = reduced(model, config, path, chosen) if fewer else None
    found = _stamp(checkpoint, model, path, kind_of, chosen, small) if small else None
    program = found or _trace_whole(checkpoint, model, path)
    add_norm_biases(checkpoint, program)
    for warning in account(checkpoint, program):
        warnings.warn(warning, stacklevel=2)
    verify(program)
    return program


@contextmanager
def _less() -> Iterator[None]:
    """Have torch do without what takes a third of a capture's time.

    It keeps a table of calls already seen: where sizes are symbolic, looking a call up and making
    its result again takes longer than the call. And it writes down for each node what called it.
    """
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def _export(model: torch.nn.Module, path: str) -> Trace:
    """Run the model once on a few tokens and record it, with dynamic numbers of tokens and rows."""
    example = (
        torch.zeros(7, dtype=torch.int64),
        torch.arange(7),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(7, dtype=torch.bool),
    )
    sizes = tuple({0: Dim.DYNAMIC} for _ in example)
    try:
        with torch.no_grad(), quiet(), _less():
            exported = torch.export.export(
                _Flat(model), example, dynamic_shapes=sizes, strict=False
            )
    except FOREIGN as error:
        name = f"a {type(model).__name__}"
        if attention.CausalMask.__name__ in str(error):
            what = f"{name} computes with its attention mask"
            raise ModelError("config.json", what, attention.OTHER) from error
        what = f"{name} cannot be traced ({first_line(error)})"
        do = "use a model whose attention transformers dispatches"
        if "Constraints violated" in str(error):  # of how many tokens there may be
            what = f"{name} computes some numbers of tokens otherwise than others, as states need"
            do = "use a model with attention in all layers"
        raise ModelError("config.json", what, do) from error
    for check in CHECKS:  # one of a mask, or of a number of rows, would keep those alive
        for node in exported.graph.find_nodes(op="call_function", target=check):
            exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    with _less():
        trace = Trace(functional(exported), model, path)
    _check_attention(trace, len(layers(model, path)))
    _check_values(trace)
    return trace


def _check_attention(trace: Trace, layers: int) -> None:
    """Raise ModelError unless each layer calls attention once and nothing else reads a mask."""
    name = f"a {type(trace.model).__name__}"
    sites = [node for node in trace.calls() if is_call(node, attention_site)]
    if [layer_of(node, f"m.{trace.path}") for node in sites] != list(range(layers)):
        what = f"{name} makes {len(sites)} calls of attention for {layers} layers"
        raise ModelError("config.json", what, "its cache cannot be found, so use another model")
    [present] = [n for n in trace.exported.graph.find_nodes(op="placeholder") if n.name == PRESENT]
    if present.users:
        what = f"{name} computes with which tokens are there, outside of attention"
        raise ModelError("config.json", what, attention.OTHER)


def _check_values(trace: Trace) -> None:
    """Raise ModelError where a model makes what a program has no type for."""
    name = f"a {type(trace.model).__name__}"
    for node in trace.calls():
        if node.target in NUMBERS:
            what = f"{name} makes sizes of what it computes, such as how many rows an expert gets"
            raise ModelError("config.json", what, "use a model that leaves them in tensors")
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            what = f"{name} computes with complex numbers, which neither ONNX nor an NPU has"
            raise ModelError("config.json", what, "use a model that rotates by sines and cosines")


def _trace_whole(checkpoint: Checkpoint, model: torch.nn.Module, path: str) -> Program:
    trace = _export(model, path)
    emitter = Emitter(checkpoint, trace, model)
    env = emitter.inputs()
    seen = set[int]()
    for node in trace.calls():
        layer = layer_of(node, f"m.{path}")
        if layer is not None and layer not in seen:
            env = emitter.layer(env, layer, layer)
            seen.add(layer)
        emitter.call(node, env, layer)
    return emitter.finish(env)


def _stamp(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    path: str,
    kind_of: list[int],
    chosen: list[int],
    small: torch.nn.Module,
) -> Program | None:
    """The program stamped out of a trace of the chosen layers; None where that is not proved."""
    trace = _export(small, path)
    made = cut(trace.calls(), f"m.{path}", len(chosen))
    templates = _templates(made, kind_of, chosen) if made else None
    if made is None or templates is None:
        return None
    emitter = Emitter(checkpoint, trace, model)
    env = emitter.inputs()
    for node in made.before:
        emitter.call(node, env, None)
    carry = env[made.layers[0].carry_in] if made.layers[0].carry_in else None
    for i, kind in enumerate(kind_of):
        template = made.layers[templates[kind]]
        inner = emitter.layer(env, templates[kind], i)
        if template.carry_in is not None and carry is not None:
            inner[template.carry_in] = carry
        for node in template.nodes:
            emitter.call(node, inner, i)
        assert template.carry_out is not None
        carry = inner[template.carry_out]
    assert made.layers[-1].carry_out is not None
    assert carry is not None
    env[made.layers[-1].carry_out] = carry
    for node in made.after:
        emitter.call(node, env, None)
    return emitter.finish(env)


def _templates(made: Cut, kind_of: list[int], chosen: list[int]) -> dict[int, int] | None:
    """For each kind, which traced layer to copy; None where two of a kind are not alike."""
    templates: dict[int, int] = {}
    for kind in dict.fromkeys(kind_of):
        traced = [at for at, i in enumerate(chosen) if kind_of[i] == kind]
        templates[kind] = traced[-1]
        if len(traced) == 1:
            continue
        a, b = (made.layers[at] for at in traced)
        if traced[0] == 0:
            a.carry_in = _entry(a.nodes, b.nodes, b.carry_in)
        if not alike(a, b, *(f"layers_{at}_" for at in traced)):
            return None
    return templates


def _entry(first: list[Node], second: list[Node], carry: Node | None) -> Node | None:
    """What the first layer takes where the second takes the value of the layer before it."""
    for a, b in zip(first, second, strict=False):
        for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=False):
            if y is carry:
                return x
    return None
