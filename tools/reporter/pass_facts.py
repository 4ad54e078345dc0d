"""What is known of a pass that ran, for a dump, a report or a line on the screen.

    summary     "4 sites in 2 of 3 layers; layer 1: 2 sites left because its K has no offset"
    counts      how often each op is called
    sizes       the bytes of parameters, caches and activations
    sources     of each node that is new, the nodes it came from

Facts and their order follow from the program alone, so two runs tell the same.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from kvc8.ir import provenance
from kvc8.ir.program import Program, op_name, type_of
from kvc8.ir.types import Dim, TensorType, Type, dim
from kvc8.passes.pipeline import Ran
from kvc8.passes.rewrite import Remark


@dataclass(frozen=True)
class ProgramBytes:
    """Bytes, as expressions of the sizes that the inputs name (ir/types.py)."""

    parameters: Dim
    caches: Dim  # as a step finds them
    activations: Dim  # all that calls give, views and the new values of caches as well


def summary(ran: Ran) -> list[str]:
    """What a pass did and left alone: a first phrase of the sites rewritten, then one a reason."""
    hits = [remark for remark in ran.remarks if not remark.why_not]
    every = {name for name in map(_layer, ran.before.graph.nodes) if isinstance(name, int)}
    reached = {name for name in map(_place, hits) if isinstance(name, int)}
    reasons: dict[str, list[Remark]] = {}
    for remark in ran.remarks:
        if remark.why_not:
            reasons.setdefault(remark.why_not, []).append(remark)
    first = f"{_sites(len(hits))} in {len(reached)} of {len(every)} layers"
    rest = [
        f"{places(map(_place, left))}: {_sites(len(left))} left because {why}"
        for why, left in reasons.items()
    ]
    return [first, *rest]


def counts(program: Program) -> Counter[str]:
    """How often each op is called, by the op's name in programs' text."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return Counter(_called(node) for node in calls)


def sizes(program: Program) -> ProgramBytes:
    """What a program holds and gives, by the sizes of types."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    given = (program.parameters(), program.caches(), calls)
    return ProgramBytes(*(_bytes(map(type_of, nodes)) for nodes in given))


def sources(ran: Ran) -> dict[str, tuple[str, ...]]:
    """The names of the nodes that each new node came from, in the program's order."""
    found = provenance.sources(ran.before, ran.after)
    return {node.name: tuple(n.name for n in olds) for node, olds in found.items()}


def _called(node: Node) -> str:
    name = str(node.target).removesuffix(".default")
    return name if "." in name else f"operator.{op_name(node.target)}"  # type: ignore[arg-type]


def _bytes(types: Iterable[Type]) -> Dim:
    total: Dim = 0
    for tensor, count in Counter(flat for type_ in types for flat in _tensors(type_)).items():
        size: Dim = count * tensor.dtype.itemsize
        for d in tensor.shape:
            size = size * d
        total = total + size
    return dim(total)


def _tensors(type_: Type) -> Iterator[TensorType]:
    if isinstance(type_, TensorType):
        yield type_
    elif isinstance(type_, tuple):
        for item in type_:
            yield from _tensors(item)


def _layer(node: Node) -> int | str:
    return _number(str(node.meta.get("origin", "")), node.name)


def _place(remark: Remark) -> int | str:
    return _number(remark.origin, remark.node)


def _number(origin: str, name: str) -> int | str:
    """The layer's number, or else the module, or else the node."""
    found = provenance.LAYER.search(origin)
    return int(found[1] or found[2]) if found else origin or name


def _sites(count: int) -> str:
    return f"{count:,} site{'s' * (count != 1)}"


def places(found: Iterable[int | str]) -> str:
    """Layers as ranges, then what lies outside of layers."""
    every = list(found)
    layers = sorted({x for x in every if isinstance(x, int)})
    ranges = [f"{a}" if a == b else f"{a}-{b}" for a, b in _ranges(layers)]
    numbers = [f"layer{'s' * (len(layers) > 1)} {', '.join(ranges)}"] if layers else []
    return ", ".join([*numbers, *dict.fromkeys(x for x in every if isinstance(x, str))])


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = None
    for i, n in enumerate(numbers):
        start = n if start is None else start
        if i + 1 == len(numbers) or numbers[i + 1] != n + 1:
            yield start, n
            start = None


Sites = Counter[tuple[str, str]]  # sites by pass and why they were left alone


def sites_of(remarks: Iterable[tuple[str, Remark]]) -> Sites:
    """How many sites each pass rewrote, and left alone for each reason."""
    return Counter((name, remark.why_not) for name, remark in remarks)
