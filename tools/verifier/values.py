"""How far each value that a pass rewrote is from what it stands for: by that pass, and in all.

    own     the pass alone: what it rewrote ran on the values that the program before it had
    total   from the same value of the CAPTURED program on the same tokens, with everything that
            passes rewrote before it, here and upstream

So a culprit has a large own error, and a victim a large total one and a small own one. Which value
of the CAPTURED program a value stands for is followed through every pass by provenance. Both are
taken in the dtypes of the programs, rounding and all; what a contract is judged by is not
(tools/verifier/contracts.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kvc8.tools.verifier.comparison import whole
from kvc8.tools.verifier.contracts import Checked
from kvc8.tools.verifier.gaps import CodeGap, Gap, gap, next_token
from kvc8.tools.verifier.recording import Recording

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Value:
    """What a value that a pass rewrote is in one call, beside what it stands for."""

    phase: str
    layer: str
    node: str
    stands_for: str  # a node of the CAPTURED program; "" where it has none
    own: Gap | CodeGap
    total: Gap | None


@dataclass(frozen=True)
class Logits:
    """The logits of a call after a pass, beside the CAPTURED program's."""

    phase: str
    kl: float  # KL(CAPTURED || this) of the next token after the last row, in nats
    top1: bool  # whether the likeliest token is the same


@dataclass
class PassValues:
    """What one pass made of the values and of the logits."""

    name: str
    values: list[Value] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)


@dataclass
class Values:
    """Watches passes being checked (`see` of tools/verifier/contracts.py)."""

    captured: Mapping[str, Named]  # by phase: what the nodes of the CAPTURED program gave
    logits_of: str  # the name of the node that gives its logits
    passes: list[PassValues] = field(default_factory=list)

    def see(self, checked: Checked) -> None:
        """Measure what one pass rewrote."""
        made = PassValues(checked.verdict.name)
        self.passes.append(made)
        nodes = {node.name: node for node in checked.after.graph.nodes}
        for site in checked.verdict.sites:
            stands_for = checked.lineage.get(site.node, "")
            base = self.captured[site.phase].get(stands_for)
            new = checked.news[site.call].values[nodes[site.node]]
            total = None
            if base is not None and isinstance(new, Tensor) and _are_floats(base, new):
                feed = checked.comparisons[site.call].feed
                total = gap(*(whole(feed, nodes[site.node], value) for value in (base, new)))
            place = (site.phase, site.layer, site.node)
            made.values.append(Value(*place, stands_for, site.own, total))
        for comparison, new in zip(checked.comparisons, checked.news, strict=False):
            base = self.captured[comparison.feed.phase][self.logits_of]
            given = new.values[new.results[0]]
            assert isinstance(given, Tensor)
            figures = next_token(base[-1], given[-1])
            made.logits.append(Logits(comparison.feed.phase, *figures))


def _are_floats(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() and tensor.numel() for tensor in tensors)


def by_name(recording: Recording) -> dict[str, Tensor]:
    """The tensors of a recording by the names of their nodes."""
    return {n.name: v for n, v in recording.values.items() if isinstance(v, Tensor)}
