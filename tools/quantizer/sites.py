"""The linears of a program that can be quantized, and which of them are to be."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch.fx import Node

from kvc8.ir import mixture_ops, ops
from kvc8.ir.checkpoint.layouts import layer_index
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import Checkpoint, kv_widths
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import stored_names
from kvc8.ir.program import (
    Program,
    argument,
    expression_of,
    is_call,
    is_parameter,
    tensor_type,
)
from kvc8.tools.quantizer.recipes.mixtures import Experts, experts

LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class LinearSite:
    """A linear that can be quantized: its module, and the nodes that it reads."""

    module: str
    linear: Node
    source: Node
    weight: Node
    bias: Node | None

    @property
    def shape(self) -> tuple[int, int]:
        """What its weight has: [out, in]."""
        out, width = tensor_type(self.weight).shape
        return int(out), int(width)


@dataclass(frozen=True)
class Cached:
    """What a layer puts into its K or V cache: the projection's name, and the rows' node."""

    name: str
    side: str  # k or v
    rows: Node
    width: int


def sites(program: Program) -> list[LinearSite]:
    """The linears inside of layers whose weight is a stored tensor that nothing else uses.

    lm_head is in no layer, and stays float as msModelSlim leaves it.
    """
    found = []
    routers = {kind.modules[0][0].rpartition(".experts.")[0] for kind in experts(program)}
    routed = {_made_of(argument(call, 1)) for call in program.calls(mixture_ops.route)}
    for linear in program.calls(LINEAR):
        weight = argument(linear, 1)
        names = list(stored_names(expression_of(weight))) if is_parameter(weight) else []
        module, _, part = names[0].rpartition(".") if len(names) == 1 else ("", "", "")
        inside = layer_index(module.split(".")) is not None
        if module.rpartition(".")[0] in routers or linear in routed:
            continue  # it chooses the experts, and stays float
        if inside and part == "weight" and len(weight.users) == 1:
            bias = argument(linear, 2) if len(linear.args) > 2 and linear.args[2] else None
            found.append(LinearSite(module, linear, argument(linear, 0), weight, bias))
    return found


def _made_of(value: Node) -> Node:
    """The linear that a choice of experts is made of; the first node that is of several values."""
    while not is_call(value, LINEAR) and len(value.all_input_nodes) == 1:
        [value] = value.all_input_nodes
    return value


def disabled_by_name(
    found: Sequence[LinearSite], patterns: Sequence[str], mixed: Sequence[Experts] = ()
) -> set[str]:
    """The modules that patterns name. Raises ModelError for one that names no linear."""
    names = [site.module for site in found]
    names += [module for kind in mixed for modules in kind.modules for module in modules]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names) and pattern != "lm_head":
            raise ModelError(
                f"--disable {pattern}",
                "names no linear of this model",
                "write one as model.layers.0.mlp.up_proj, or with * for any characters",
            )
    return {s.module for s in found if any(fnmatch(s.module, p) for p in patterns)}


def choose(
    found: Sequence[LinearSite],
    disabled: Sequence[str],
    down_proj: bool,
    mixed: Sequence[Experts] = (),
) -> list[LinearSite]:
    """The linears to quantize; the others stay float.

    A down_proj stays float unless `down_proj`, as msModelSlim's script has it. Where one of the
    linears that read the same value (q, k and v, say) stays float the others do too: runtimes pack
    them into one.
    """
    named = disabled_by_name(found, disabled, mixed)
    left = {s.source for s in found if s.module in named or (is_down(s) and not down_proj)}
    return [site for site in found if site.source not in left]


def readers(found: Sequence[LinearSite]) -> dict[Node, Node]:
    """Of each value that linears read, the first that reads it, and the value: where it is seen.

    A layer without norms before its linears reads what the layer before it made.
    """
    first: dict[Node, Node] = {}
    for site in found:
        first.setdefault(site.source, site.linear)
    return {linear: source for source, linear in first.items()}


def labels(chosen: Sequence[LinearSite], act: str, dynamic: Sequence[str]) -> dict[str, str]:
    """The labels of the linears whose activations are not static, by module.

    `act` is what all are, static, dynamic or mix; `dynamic` are patterns of those that are dynamic
    all the same, with those that read the same value. Raises ModelError for one that names none.
    """
    for pattern in dynamic:
        if not any(fnmatch(site.module, pattern) for site in chosen):
            do = "write one as model.layers.0.mlp.up_proj, or with * for any characters"
            raise ModelError(f"--dynamic {pattern}", "names no linear that is quantized", do)
    named = {s.source for s in chosen if any(fnmatch(s.module, p) for p in dynamic)}
    kinds = {"dynamic": "W8A8_DYNAMIC", "mix": "W8A8_MIX"}
    found = {s.module: "W8A8_DYNAMIC" if s.source in named else kinds.get(act) for s in chosen}
    return {module: label for module, label in found.items() if label}


def is_down(site: LinearSite) -> bool:
    """Whether a linear is a down_proj."""
    return site.module.endswith(".down_proj")


def cached(program: Program, checkpoint: Checkpoint) -> list[Cached]:
    """What each layer caches. Raises ModelError where that is no K and V of config.json's width."""
    where = place(checkpoint.path, "config.json")
    if checkpoint.config.get("kv_lora_rank"):
        what = "asks for multi-head latent attention, whose cache of latents kvc8 keeps in float"
        raise ModelError(where, what, "compile it as it is")
    widths = kv_widths(checkpoint.config, where)
    found = []
    for write in program.calls(ops.cache_write):
        side, _, layer = argument(write, 0).name.partition("_cache_")
        rows = argument(write, 1)
        _, heads, dim = tensor_type(rows).shape
        width = int(heads) * int(dim)
        if width != widths[int(layer)]:
            what = f"says {widths[int(layer)]} KV channels in layer {layer} and the model"
            do = "correct num_key_value_heads and head_dim"
            raise ModelError(where, f"{what} caches {width}", do)
        found.append(Cached(f"{write.meta['origin']}.{side}_proj", side, rows, width))
    return found


def vocabulary(program: Program) -> int:
    """How many tokens the program knows."""
    tables = [argument(node, 0) for node in program.calls(torch.ops.aten.embedding.default)]
    return min(int(tensor_type(table).shape[0]) for table in tables)
