"""What must hold of a program at each stage. Runs after every pass; there is no way to skip it.

At every stage: what fx's own lint asks for (values are of this graph and come before who takes
them, no name is given twice); only placeholders, calls and one output; each call's type is what its
op infers from its arguments now; the output is the logits and each cache as it now is; and
no op writes to its arguments, but that in a LOWERED program the NPU's cache writes may, and to what
aten.new_empty made for them, before anything else reads that. Where ranks divide the program among
them, the logits are the same on all of them (ir/ranks.py).
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import Argument

from kvc8.ir import mixture_ops, npu, ops, rank_ops
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Arg, Expression
from kvc8.ir.nz import nz_row
from kvc8.ir.program import (
    Program,
    Stage,
    argument,
    is_cache,
    is_call,
    is_nz,
    tensor_type,
    type_of,
    users,
)
from kvc8.ir.ranks import each_ranks_own
from kvc8.ir.token_cache import check_same_token, quantized_tokens
from kvc8.ir.types import show_type

LINEARS = {ops.quantize, ops.quant_linear, ops.quantize_tokens, ops.dynamic_linear}
MIXTURE = {
    *(mixture_ops.route, mixture_ops.combine),
    *(mixture_ops.grouped_linear, mixture_ops.dynamic_grouped_linear),
}
FLOAT = frozenset({ops.cache_write, ops.paged_attention, *LINEARS, *MIXTURE})
RANKS = frozenset(
    {rank_ops.int_linear, rank_ops.dequant_sum, rank_ops.all_reduce, rank_ops.all_gather}
)
OPS: Mapping[Stage, frozenset[OpOverload]] = MappingProxyType(
    {
        Stage.CAPTURED: FLOAT,
        Stage.QUANTIZED: FLOAT | RANKS | {ops.dequantize, ops.dequantize_tokens},
        Stage.LOWERING: FLOAT | RANKS | {ops.dequantize, ops.dequantize_tokens},
        Stage.LOWERED: frozenset(),
    }
)
SUMMED = (ops.quant_linear, torch.ops.aten.linear.default, npu.npu_quant_matmul)
NPU_SPACES = ("npu", "atb", "_c10d_functional")
NPU_STAGES = (Stage.LOWERING, Stage.LOWERED)


def verify(program: Program) -> None:
    """Raise IRError at the first node that may not be where it is."""
    _check_graph(program.graph)
    for node in program.unverified():
        _check_call(program, node)
    caches = program.caches()
    _check_output(program, caches)
    _check_ranks(program)
    for cache in caches:
        _check_cache(program.stage, cache)


def _check_graph(graph: Graph) -> None:
    """What torch.fx.Graph.lint checks of a graph without modules, in a quarter of its time."""
    seen, names = set[Node](), set[str]()
    for node in graph.nodes:
        if node.op not in ("call_function", "placeholder", "output"):
            raise IRError(node.name, f"a {node.op} node", "capture with torch.export")
        if not seen.issuperset(node._input_nodes):
            [first, *_] = (each for each in node._input_nodes if each not in seen)
            where = "comes after it" if first.graph is graph else "is of another graph"
            raise IRError(node.name, f"takes {first.name}, which {where}", "move the call")
        if node.name in names:
            raise IRError(node.name, "is the name of two nodes", "name one of them otherwise")
        seen.add(node)
        names.add(node.name)


def _check_call(program: Program, node: Node) -> None:
    """Check a call, of which nothing need be checked again until something of it changes.

    But where it writes to its arguments it matters who else uses them, which is not its own.
    """
    written = _check_op(program.stage, node)
    _check_type(program, node)
    if not written:
        program.mark_right(node)


def _check_op(stage: Stage, node: Node) -> tuple[int, ...]:
    """Check that a call may be there; gives the places of the arguments that it writes to."""
    op = node.target
    if not isinstance(op, OpOverload):
        return ()  # arithmetic on the host, or an item of a tuple
    legal, written = _rule(stage, op)
    if not legal:
        what = f"{op} has no place in a {stage.value} program"
        raise IRError(node.name, what, "run the pass that replaces it")
    for arg in [node.args[i] for i in written if i < len(node.args)]:
        if stage is not Stage.LOWERED or not _may_be_written(arg, node):
            raise IRError(node.name, f"{op} writes to {arg}", "use its functional form")
    return written


def _may_be_written(arg: Argument, by: Node) -> bool:
    """Whether it is a cache, or a new tensor that nothing reads before it is written."""
    if not isinstance(arg, Node):
        return False
    new = is_call(arg, torch.ops.aten.new_empty.default)
    return is_cache(arg) or (new and not any(user < by for user in arg.users))


@functools.cache
def _rule(stage: Stage, op: OpOverload) -> tuple[bool, tuple[int, ...]]:
    """Whether a stage may have an op, and the places of the arguments that it writes to."""
    if op.namespace == "kvc8":
        return op in OPS[stage], _written(op)
    npu_op = op.namespace in NPU_SPACES and stage in NPU_STAGES
    return op.namespace == "aten" or npu_op, _written(op)


def _written(op: OpOverload) -> tuple[int, ...]:
    """The places of the arguments that an op writes to, said by its schema or not."""
    specs = enumerate(op._schema.arguments)
    said = [i for i, spec in specs if spec.alias_info is not None and spec.alias_info.is_write]
    return (*said, *npu.UNSAID_WRITES.get(op, ()))


def _check_type(program: Program, node: Node) -> None:
    fresh, marked_as = program.infer(node), type_of(node)
    if fresh is not marked_as and fresh != marked_as:
        marked, is_ = show_type(marked_as), show_type(fresh)
        why = "the pass that changed its arguments must set it again"
        raise IRError(node.name, f"marked {marked} but is {is_}", why)


def _check_output(program: Program, caches: Sequence[Node]) -> None:
    last = next(iter(reversed(program.graph.nodes)), None)
    if last is None or last.op != "output" or not isinstance(last.args[0], tuple | list):
        raise IRError("the program", "has no output", "end it with `return [...]`")
    results = [tensor_type(item) for item in last.args[0]]
    if not caches:
        return  # a fragment, as in the documentation of passes
    given = results[len(results) - len(caches) :]
    for cache, result in zip(caches, given, strict=True):
        if tensor_type(cache) != result:
            what = f"is {tensor_type(cache)} but comes back as {result}"
            raise IRError(cache.name, what, "return the caches in the order of the inputs")


def _check_ranks(program: Program) -> None:
    """Who takes a value for what all ranks have gets that: the logits, and divided outputs.

    A linear of which each rank has some outputs reads all of its input, the same on each rank.
    """
    own = each_ranks_own(program)
    [output] = program.graph.find_nodes(op="output")
    takers = [(node, argument(node, 0)) for node in own if _has_some_outputs(node)]
    for taker, value in [*sorted(takers), (output, output.args[0][0])]:
        if value in own:
            first = min(node for node in _behind(value, own) if node.op == "call_function")
            what = f"is another on each rank, and {taker.name} takes it for what all have"
            raise IRError(first.name, what, "put a collective between them")


def _has_some_outputs(node: Node) -> bool:
    """Whether a call is a linear of which each rank has some of the outputs."""
    if not is_call(node, *SUMMED):
        return False
    expression: Arg = argument(node, 1).meta.get("expression")
    while isinstance(expression, Expression) and expression.op in ("cast", "transpose"):
        expression = expression.args[0]
    if not isinstance(expression, Expression) or expression.op != "shard":
        return False
    inner = expression.args[0]
    made = isinstance(inner, Expression) and inner.op == "derived"  # whose parts lie end to end
    return expression.args[1] == 0 and not made


def _behind(node: Node, own: set[Node]) -> set[Node]:
    """What each rank has of its own that a node is computed of, and the node."""
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in own and source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _check_cache(stage: Stage, cache: Node) -> None:
    dtype = tensor_type(cache).dtype
    if is_nz(cache):
        nz_row(cache)
        if stage is not Stage.LOWERED or dtype is not torch.int8:
            what = f"an NZ cache of {dtype} in a {stage.value} program"
            raise IRError(cache.name, what, "only int8 ones are, in a lowered program")
    if stage is Stage.CAPTURED and not dtype.is_floating_point:
        raise IRError(cache.name, f"an {dtype} cache in a captured program", "capture a float one")
    if stage is Stage.QUANTIZED and dtype is torch.int8:
        for write in [user for user in cache.users if is_call(user, ops.cache_write)]:
            _check_same_scale(write)


def _check_same_scale(write: Node) -> None:
    """What goes into an int8 cache was quantized as what comes out of it is dequantized."""
    rows = argument(write, 1)
    tokens = quantized_tokens(rows)
    if not is_call(rows, ops.quantize) and tokens is None:
        raise IRError(write.name, f"rows {rows.name} are not quantized", "quantize them")
    for reader in users(write):
        if tokens is not None:
            check_same_token(write, reader, tokens)
        elif not is_call(reader, ops.dequantize) or reader.args[1:3] != rows.args[1:3]:
            what = f"reads {write.name} otherwise than {rows.name} quantized it"
            raise IRError(reader.name, what, "dequantize by the same scale and zero")
