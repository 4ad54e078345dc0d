"""Write a program out of the calls that torch.export recorded of a model.

A call of `kvc8.attention_site` becomes the layer's cache writes and paged attention; every other
is copied in canonical form (ir/capture/canonical.py). Placeholders become inputs, parameters and
caches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from kvc8.ir import ops
from kvc8.ir.capture.canonical import copy_call
from kvc8.ir.capture.names import names_of
from kvc8.ir.capture.parameters import cache_expressions, constant_expression, parameter_expression
from kvc8.ir.capture.stamp import layer_of
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program, Stage, is_call, tensor_type
from kvc8.ir.types import TensorType, size

PRESENT = "present"  # an input of the traced model that no program has: which tokens are there
STEP_INPUTS = ("slot_mapping", "block_table", "seq_lens", "query_starts")


@torch.library.custom_op("kvc8::attention_site", mutates_args=())
def _attention_site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one sequence over itself: q [T, Hq, D], k and v [T, H, D]."""
    mask = ops.causal_mask(q.shape[0], k.shape[0], window)
    return ops.attend(q.float(), k.float(), v.float(), mask, scale, softcap, sinks).to(q.dtype)


@_attention_site.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


attention_site = torch.ops.kvc8.attention_site.default


@dataclass
class Trace:
    """An exported model of `layers` layers and what is needed to read it."""

    exported: ExportedProgram
    model: torch.nn.Module
    path: str  # of the list of layers, "model.layers"

    def calls(self) -> list[Node]:
        """The calls of the graph, in order."""
        return [node for node in self.exported.graph.nodes if node.op == "call_function"]


class Emitter:
    """Writes a program out of an exported graph's calls."""

    def __init__(self, checkpoint: Checkpoint, trace: Trace, model: torch.nn.Module) -> None:
        kind = str(getattr(trace.model.config, "model_type", ""))
        self.known = names_of((kind, type(model).__name__), checkpoint.tensors)
        self.checkpoint, self.trace, self.model = checkpoint, trace, model
        self.program = Program(Graph(), Stage.CAPTURED)
        signature = trace.exported.graph_signature
        self.names: Mapping[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.aliases = _aliases(model)
        self.outputs: list[Node] = []
        self.step: dict[str, Node] = {}

    def inputs(self) -> dict[Node, Node]:
        """The inputs of a step, and the parameters that belong to no layer."""
        tokens, seqs = size("T"), size("B")
        program, i64, i32 = self.program, torch.int64, torch.int32
        made = {
            "input_ids": program.placeholder("input_ids", TensorType(i64, (tokens,))),
            "positions": program.placeholder("positions", TensorType(i64, (tokens,))),
        }
        shapes = ((tokens,), (seqs, size("M")), (seqs,), (seqs + 1,))
        for name, shape in zip(STEP_INPUTS, shapes, strict=True):
            self.step[name] = program.placeholder(name, TensorType(i32, shape))
        rows = TensorType(i64, (size("R"),))
        made["logits_rows"] = program.placeholder("logits_rows", rows)
        env = {}
        for node in self.trace.exported.graph.find_nodes(op="placeholder"):
            if node.name in made:
                env[node] = made[node.name]
            elif node.name != PRESENT and self._layer(node) is None:
                env[node] = self.parameter(node, self._path(node))
        return env

    def layer(self, env: dict[Node, Node], template: int, layer: int) -> dict[Node, Node]:
        """What a copy of a traced layer sees: what all see, and its own parameters."""
        inner, path = dict(env), self.trace.path
        for node in self.trace.exported.graph.find_nodes(op="placeholder"):
            if self._layer(node) == template:
                name = self._path(node).replace(f"{path}.{template}.", f"{path}.{layer}.", 1)
                inner[node] = self.parameter(node, name)
        return inner

    def _path(self, node: Node) -> str:
        return self.names[node.name].removeprefix("m.")

    def _layer(self, node: Node) -> int | None:
        head, _, rest = self.names.get(node.name, "").partition(f"m.{self.trace.path}.")
        return int(rest.split(".")[0]) if rest and not head else None

    def parameter(self, node: Node, name: str) -> Node:
        """The parameter, buffer or constant of an exported placeholder, under its name."""
        val = node.meta["val"]
        type_ = TensorType(val.dtype, tuple(val.shape))
        signature = self.trace.exported.graph_signature
        if (
            node.name in signature.inputs_to_parameters
            or self.known.stored(name) in self.checkpoint.tensors
        ):
            names = self.aliases.get(name, (name,))
            expression = parameter_expression(
                self.checkpoint, self.known, names, tuple(val.shape), val.dtype
            )
        else:
            expression = constant_expression(_constant(self.trace, self.names[node.name]))
        return self.program.placeholder(name.replace(".", "_"), type_, expression)

    def call(self, node: Node, env: dict[Node, Node], layer: int | None) -> None:
        """Append a call; one of a site becomes cache writes and paged attention."""
        if is_call(node, attention_site):
            assert layer is not None
            env[node] = self.attention(node, env, layer)
        else:
            copy_call(self.program, node, env, self._origin(node, layer))

    def attention(self, node: Node, env: dict[Node, Node], layer: int) -> Node:
        """The cache of a layer, written and attended to."""
        q, k, v = (env[arg] for arg in node.args[:3])  # type: ignore[index]
        scale, window, softcap, sinks = node.args[3:]
        sinks = env[sinks] if isinstance(sinks, Node) else sinks
        (_, heads, k_dim), (*_, v_dim) = tensor_type(k).shape, tensor_type(v).shape
        expressions = cache_expressions(self.checkpoint, layer, int(heads), int(k_dim), int(v_dim))
        written = []
        for name, rows, expression in zip("kv", (k, v), expressions, strict=True):
            type_ = tensor_type(rows)
            full = TensorType(type_.dtype, (size("N"), size("S"), *type_.shape[1:]))
            cache = self.program.placeholder(f"{name}_cache_{layer}", full, expression)
            write = (cache, rows, self.step["slot_mapping"])
            written.append(self.program.append(ops.cache_write, write, {}, f"{name}_new_{layer}"))
        self.outputs += written
        step = [self.step[name] for name in STEP_INPUTS[1:]]
        args = (q, *written, *step, scale, window, softcap, sinks)
        out = self.program.append(ops.paged_attention, args, {}, f"attention_{layer}")
        for made in (*written, out):
            made.meta["origin"] = self._origin(node, layer)
        return out

    def _origin(self, node: Node, layer: int | None) -> str:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = str(stack[-1][0]).removeprefix("m.") if stack else ""
        path, traced = self.trace.path, layer_of(node, f"m.{self.trace.path}")
        if traced is not None and layer is not None:
            name = name.replace(f"{path}.{traced}", f"{path}.{layer}", 1)
        return name if name not in ("m", "_empty_nn_module_stack_from_metadata_hook") else ""

    def finish(self, env: dict[Node, Node]) -> Program:
        """Return the logits and caches, and drop what nothing uses."""
        [result] = self.trace.exported.graph.find_nodes(op="output")
        [[logits]] = result.args
        self.program.graph.output([env[logits], *self.outputs])
        self.program.drop_dead_calls()
        self.program.drop_unused_parameters()
        return self.program


def _aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter all the names it goes by, its own first: tied weights have several."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(sorted(names, key=lambda n: n != name))
        for names in by_id.values()
        for name in names
    }


def _constant(trace: Trace, name: str) -> Tensor:
    """A buffer or constant that no checkpoint holds: its module is built again, with data."""
    constant = trace.exported.constants.get(name)
    if isinstance(constant, Tensor) and type(constant) is Tensor:
        return constant
    path, _, part = name.removeprefix("m.").rpartition(".")
    module = trace.model.get_submodule(path)
    kept = getattr(getattr(module, part), "constant", None)
    if isinstance(kept, Tensor):
        return kept
    try:
        again = type(module)(config=trace.model.config)
    except (TypeError, ValueError, AttributeError) as error:
        what = f"a buffer that no checkpoint holds and {type(module).__name__} cannot rebuild"
        raise ModelError(name, what, "its model is not supported") from error
    found = getattr(again, part)
    if not isinstance(found, Tensor):
        raise ModelError(name, "is no tensor", "its model is not supported")
    return found
