"""What the page tells of each pass, kept while the passes run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from kvc8.ir.program import is_cache
from kvc8.ir.text import show_node
from kvc8.passes.pipeline import Ran
from kvc8.tools.reporter import pass_facts
from kvc8.tools.reporter.drawing import Drawing, draw
from kvc8.tools.reporter.groups import alike
from kvc8.tools.reporter.scenes import OUTSIDE, SIGNS, Mark, marks, parts, scene, shape

KINDS = 3  # of layers that are drawn of one pass
WIDE = 780  # pixels: a drawing as wide as this is hard to read in half of a screen
LONGEST = 600  # characters of a node's text; constants may be long lists


@dataclass(frozen=True)
class Line:
    """A node that a pass changed: its sign, its text, and the nodes it came from."""

    sign: str
    text: str
    sources: str = ""


@dataclass(frozen=True)
class Pair:
    """One layer before and after a pass."""

    layer: str  # that is drawn
    alike: str  # the layers it stands for
    before: Drawing
    after: Drawing
    lines: Sequence[Line]
    left_out: int  # nodes that are not drawn

    @property
    def wide(self) -> bool:
        """Whether the two stand one above the other."""
        return max(self.before.width, self.after.width) > WIDE


@dataclass(frozen=True)
class StepFacts:
    """What is told of a pass that ran."""

    anchor: str
    path: str
    number: int
    name: str
    contract: str
    summary: Sequence[str]
    hits: int
    misses: int
    nodes: tuple[int, int]  # calls before and after
    calls: Sequence[tuple[str, int, int]]  # ops whose count changed, before and after
    pairs: Sequence[Pair]
    not_drawn: str  # layers of kinds that are not drawn


@dataclass
class _Sides:
    """A program's layers before and after a pass, with what was changed in them."""

    before: Mapping[str, list[Node]]
    after: Mapping[str, list[Node]]
    gone: Mapping[Node, Mark]
    new: Mapping[Node, Mark]

    def touched(self) -> list[str]:
        """The layers in which something changed."""
        names = dict.fromkeys([*self.before, *self.after])
        return [
            name
            for name in names
            if any(node in marked for nodes, marked in self.of(name) for node in nodes)
        ]

    def of(self, name: str) -> list[tuple[list[Node], Mapping[Node, Mark]]]:
        """One layer before and after."""
        return [(self.before.get(name, []), self.gone), (self.after.get(name, []), self.new)]

    def kinds(self) -> list[list[str]]:
        """The layers that changed, in classes that are alike but for names."""
        names = [name for name in self.touched() if name != OUTSIDE]
        shapes = [tuple(shape(nodes, marked) for nodes, marked in self.of(n)) for n in names]
        return [[names[i] for i in kind] for kind in alike(shapes)]


@dataclass
class PassSteps:
    """Watches passes; keeps what the page tells of them, and the text of the nodes it draws."""

    steps: list[StepFacts] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    names: dict[str, dict[str, None]] = field(default_factory=dict)  # of all nodes, by layer
    seconds: list[float] = field(default_factory=list)  # of processor time, of each pass

    def see(self, ran: Ran) -> None:
        """Look at a pass that ran."""
        was, now = pass_facts.counts(ran.before), pass_facts.counts(ran.after)
        left = sum(bool(remark.why_not) for remark in ran.remarks)
        sides = _Sides(parts(ran.before), parts(ran.after), *marks(ran))
        for part, nodes in (*sides.before.items(), *sides.after.items()):
            self.names.setdefault(part, {}).update((node.name, None) for node in nodes)
        kinds = sides.kinds()
        rest = [name for kind in kinds[KINDS:] for name in kind]
        outside = [[OUTSIDE]] if OUTSIDE in sides.touched() else []
        found = StepFacts(
            anchor="-".join(filter(None, ("pass", ran.path, f"{ran.number:02}"))),
            path=ran.path,
            number=ran.number,
            name=ran.step.name,
            contract=ran.step.contract,
            summary=pass_facts.summary(ran),
            hits=len(ran.remarks) - left,
            misses=left,
            nodes=(was.total(), now.total()),
            calls=[(op, was[op], now[op]) for op in sorted(was | now) if was[op] != now[op]],
            pairs=[self._pair(ran, sides, kind) for kind in [*kinds[:KINDS], *outside]],
            not_drawn=_together(rest) if rest else "",
        )
        self.steps.append(found)
        self.seconds.append(ran.seconds)

    def number(self, node: Node) -> int:
        """The number of a node's text among those of the page."""
        return self.lines.setdefault(_text(node), len(self.lines))

    def _pair(self, ran: Ran, sides: _Sides, kind: Sequence[str]) -> Pair:
        before, after = (scene(nodes, marked) for nodes, marked in sides.of(kind[0]))
        where = f"{ran.step.name}, {kind[0]}"
        lines = _changed(sides.of(kind[0]), pass_facts.sources(ran))
        return Pair(
            layer=kind[0],
            alike=_together(kind),
            before=draw(before, f"{where}, before", self.number),
            after=draw(after, f"{where}, after", self.number),
            lines=lines,
            left_out=before.left_out + after.left_out,
        )


def _changed(
    sides: Sequence[tuple[Sequence[Node], Mapping[Node, Mark]]],
    sources: Mapping[str, Sequence[str]],
) -> list[Line]:
    """The lines of a layer that a pass took away or changed, then those it made of them."""
    before, after = ([*_read(nodes, marked)] for nodes, marked in sides)
    made = [
        Line(SIGNS[mark], _text(node), ", ".join(sources.get(node.name, ())))
        for node, mark in after
    ]
    gone = [Line(SIGNS["gone"], _text(node)) for node, _ in before]
    return [*gone, *made]


def _read(nodes: Sequence[Node], marked: Mapping[Node, Mark]) -> Iterator[tuple[Node, Mark]]:
    """What is marked of a layer's nodes and the parameters they read, parameters first."""
    here = set(nodes)
    read = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in here)
    parameters = [node for node in read if node.op == "placeholder" and not is_cache(node)]
    yield from ((node, marked[node]) for node in (*parameters, *nodes) if node in marked)


def _text(node: Node) -> str:
    text = show_node(node)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _together(names: Sequence[str]) -> str:
    """Layers as ranges."""
    numbers = [int(name.removeprefix("layer ")) for name in names if name != OUTSIDE]
    return pass_facts.places(numbers) if numbers else f"{OUTSIDE} of the layers"
