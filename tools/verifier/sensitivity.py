"""`kvc8-verify sensitivity`: what quantizing the K or the V of one layer costs, by itself.

The prompt runs once with a float cache, in float32. Then, for each cache, it runs again with only
that cache's rows put through their int8 codes and back, by the same ops and scales as in the
QUANTIZED program. Up to that cache nothing changes, so each of these runs starts there, from the
values that the first had. The last row puts all caches through.

W8A8 linears compute with the weights that their codes stand for, and with float activations: each
activation quantizer would amplify whatever reaches it, so that any disturbance at all, however
small, cost the same, and more the more layers follow it.

Divergences are of the next token after each token of the prompt: KL(float cache || that one).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import Node

from kvc8.backends.runtime import model as runtime
from kvc8.backends.runtime.inputs import CPU, Rows, inputs
from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import Expression, make
from kvc8.ir.program import Program, argument, expression_of, is_cache, substitute, tensor_type
from kvc8.ir.provenance import layer_of
from kvc8.ir.run import Value, last_uses
from kvc8.passes import pipeline
from kvc8.passes.insert_dynamic_quant import insert_dynamic_quant
from kvc8.passes.insert_kv_quant import insert_kv_quant
from kvc8.passes.insert_linear_quant import insert_linear_quant
from kvc8.passes.options import Options
from kvc8.tools.evaluator.divergence import Figures
from kvc8.tools.verifier.forms import BLOCK

ALL = "all"
Values = dict[Node, Value]


@dataclass(frozen=True)
class CacheCost:
    """What quantizing one cache alone costs, or all of them: divergences in nats."""

    layer: str
    cache: str  # "K", "V" or "K and V"
    kl: float  # mean over the tokens of the prompt
    kl_p99: float
    top1: float  # share of tokens after which the likeliest token stays the same


@dataclass(frozen=True)
class CacheSite:
    """A cache that the checkpoint has scales for: its write, and how its rows are quantized."""

    write: Node
    layer: str
    cache: str
    scale: Tensor  # float32 [heads, head_dim]
    zero: Tensor | None

    def value(self, values: Mapping[Node, Value]) -> Value:
        """What the write gives when its rows went through their codes."""
        cache, rows, slots = (values[argument(self.write, i)] for i in range(3))
        codes = ops.quantize(rows, self.scale, self.zero)
        assert isinstance(cache, Tensor)
        back = ops.dequantize(codes, self.scale, self.zero, cache.dtype)
        return self.write.target(cache, back, slots)  # type: ignore[operator]


def sensitivity(
    checkpoint: Checkpoint, prompt: Sequence[int], options: Options = pipeline.DEFAULT
) -> list[CacheCost]:
    """The cost of each cache alone, in the order of the layers, and last of all at once.

    Raises ModelError where the checkpoint has no scales for any cache, or `prompt` has fewer than
    two tokens.
    """
    if len(prompt) < 2:
        raise ModelError("the prompt", "has fewer than 2 tokens", "give a longer one, by --text")
    program = capture(checkpoint, torch.float32)
    steps = pipeline.quantize_passes(options)
    left_out = insert_linear_quant, insert_dynamic_quant, insert_kv_quant
    pipeline.run(program, tuple(step for step in steps if step not in left_out))
    sites = list(_sites(program, checkpoint))
    if not sites:
        what = "has no scales for its KV cache"
        raise ModelError(str(checkpoint.path), what, "quantize it first, with kvc8-quantize")
    starts: dict[Node, Values] = {site.write: {} for site in sites}
    given = _given(program, checkpoint, prompt)
    base = _run(program, given, None, {}, starts)
    tokens = torch.tensor(prompt)

    def cost(layer: str, cache: str, logits: Tensor) -> CacheCost:
        seen = Figures()
        seen.add(logits, base, tokens)
        return CacheCost(layer, cache, seen.kl_mean, seen.kl_p99, seen.top1)

    found = []
    for site in sites:
        start = starts.pop(site.write)
        logits = _run(program, start, site.write, {site.write: site}, {})
        found.append(cost(site.layer, site.cache, logits))
    every = {site.write: site for site in sites}
    return [*found, cost(ALL, "K and V", _run(program, given, None, every, {}))]


def _sites(program: Program, checkpoint: Checkpoint) -> Iterator[CacheSite]:
    """The caches with scales, in the program's order; K of a layer is written before V."""
    kinds = {cache: "KV"[i % 2] for i, cache in enumerate(program.caches())}
    for write in program.calls(ops.cache_write):
        cache = argument(write, 0)
        if not is_cache(cache) or not expression_of(cache).args:
            continue
        scale, zero = (
            _made(expression, cache, checkpoint) if isinstance(expression, Expression) else None
            for expression in expression_of(cache).args[:2]
        )
        assert scale is not None
        yield CacheSite(write, layer_of(write), kinds[cache], scale, zero)


def _made(expression: Expression, cache: Node, checkpoint: Checkpoint) -> Tensor:
    heads, width = tensor_type(cache).shape[2:]
    return make(expression, checkpoint.read).float().reshape(int(heads), int(width))


def _given(program: Program, checkpoint: Checkpoint, prompt: Sequence[int]) -> Values:
    """A value for each placeholder: one fresh prompt, and the logits of each of its tokens."""
    blocks = -(-len(prompt) // BLOCK)
    model = runtime.load(
        {"prefill": program, "decode": program},
        lambda expression: make(expression, checkpoint.read),
        blocks=blocks,
        block_size=BLOCK,
    )
    names = [node.name for node in program.inputs()]
    step = inputs([Rows(prompt, 0, range(blocks))], BLOCK, CPU, True, names)
    values = {**model.parameters["prefill"], **model.caches, **step}
    return {n: values[n.name] for n in program.graph.nodes if n.op == "placeholder"}


@torch.no_grad()
def _run(
    program: Program,
    start: Values,
    first: Node | None,
    changed: Mapping[Node, CacheSite],
    starts: dict[Node, Values],
) -> Tensor:
    """The logits, from the node `first` on, or from the beginning.

    `start` has all values that are needed from there on. Writes in `changed` go through their
    codes. What `starts` names gets the values that are needed from that node on.
    """
    values, last, begun = dict(start), last_uses(program), first is None
    for node in program.graph.nodes:
        begun = begun or node is first
        if not begun or node.op == "placeholder":
            continue
        if node.op == "output":
            break
        if node in starts:
            starts[node] = dict(values)
        values[node] = changed[node].value(values) if node in changed else _called(node, values)
        for dead in last.get(node, ()):
            del values[dead]
    logits = values[node.args[0][0]]
    assert isinstance(logits, Tensor)
    return logits


def _called(node: Node, values: Values) -> Value:
    args = [substitute(arg, values.__getitem__) for arg in node.args]
    kwargs = {name: substitute(arg, values.__getitem__) for name, arg in node.kwargs.items()}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def print_costs(costs: Sequence[CacheCost], tokens: int) -> None:
    """A line for each layer, K beside V."""
    each, every = costs[:-1], costs[-1]
    print(f"{tokens} tokens of prompt, float linears, against a float cache; KL in nats")
    Console(width=100).print(_table(each))
    figures = f"KL {every.kl:.2g}, 99 % {every.kl_p99:.2g}, same top token {every.top1:.1%}"
    print(f"all at once: {figures}; the sum of the KLs above is {sum(c.kl for c in each):.2g}")


def _table(costs: Sequence[CacheCost]) -> Table:
    made = Table(box=None)
    made.add_column("", no_wrap=True)
    for cache in "KV":
        for name in (f"{cache}: KL, mean", "KL, 99 %", "same top token"):
            made.add_column(name, justify="right", no_wrap=True)
    for layer in dict.fromkeys(cost.layer for cost in costs):
        of = {cost.cache: _figures(cost) for cost in costs if cost.layer == layer}
        made.add_row(layer, *of.get("K", [""] * 3), *of.get("V", [""] * 3))
    return made


def _figures(cost: CacheCost) -> list[str]:
    return [f"{cost.kl:.2g}", f"{cost.kl_p99:.2g}", f"{cost.top1:.1%}"]
