"""Hold each pass to its contract, on the same recorded inputs before and after it.

A pass runs on a copy of the program. The program before it runs first and every value is kept; then
the program after it, in which each value that should be what it was is compared with that, and
then takes it: so whatever a pass rewrote is computed from the inputs that it had before, and what
differs was done there (isolated). What is compared is read off the graphs (ir/provenance.py): what
took another node's place, what a region of changed nodes gives, and all that was kept.

    bit_exact   equal bit for bit in the dtypes of the program; NaN equals NaN
    real_exact  equal without rounding (ir/precision/twins.py): within 1e-9 of the largest value,
                codes equal
    quantizing  without rounding, within the bound of the pass's module, element by element; codes
                in the dtypes of the program too
    layout      bit_exact, after a reshape

Why 1e-9: a sum of n <= 2**17 terms in float64 is off by n * 2**-53 < 2e-11 of the sum of their
sizes, which leaves a factor of 60 to terms that cancel and to what a region does one after another.
For every contract: no value that was finite may cease to be.

What rounding does in the program's own dtypes is shown and not judged: it has no bound here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.nz import to_nz
from kvc8.ir.program import Program
from kvc8.ir.provenance import Provenance, layer_of, provenance
from kvc8.ir.ranks import side_by_side
from kvc8.passes.rewrite import Contract, Pass, Remark, Step, name_of, pass_of
from kvc8.passes.shard import shard
from kvc8.tools.verifier.comparison import Comparison
from kvc8.tools.verifier.divided import OF_RANK, divided, laid_out
from kvc8.tools.verifier.recording import Feed, Parameters, Recording, State, empty, record
from kvc8.tools.verifier.verdicts import Verdict


@dataclass(frozen=True)
class RecordedCall:
    """One call of a program; without a state it continues with the caches of the call before."""

    feed: Feed
    state: State | None = None


@dataclass
class Checked:
    """One pass that was run: the programs, what they gave, and the verdict."""

    before: Program
    after: Program
    olds: list[Recording]
    found: Provenance
    verdict: Verdict
    lineage: Mapping[str, str]  # of nodes after, by name: what they stand for at the beginning
    comparisons: list[Comparison] = field(default_factory=list)  # one a call
    news: list[Recording] = field(default_factory=list)  # the program after, nothing isolated
    contracts: Mapping[Node, Contract] = field(default_factory=dict)  # of sites with their own


def check(
    program: Program,
    steps: Sequence[Step],
    calls: Sequence[RecordedCall],
    parameters: Parameters,
    see: Callable[[Checked], None] = lambda checked: None,
    lineage: dict[str, str] | None = None,
    ranks: int = 1,
) -> list[Verdict]:
    """Run passes over a program and hold each to its contract; stops where verify refuses one.

    A program of several `ranks` runs with all of them side by side.

    `see` is shown each pass that ran, with everything that was recorded. `lineage`, of the nodes of
    the program by name, is what they stand for, by default themselves; it follows the passes.
    """
    verdicts = []
    lineage = {n.name: n.name for n in program.graph.nodes} if lineage is None else lineage
    before = side_by_side(program, ranks)
    olds = _run(before, calls, parameters)
    for step in steps:
        verdict = Verdict(name_of(step), pass_of(step).contract)
        verdicts.append(verdict)
        try:
            remarks = step(program)
        except IRError as error:
            _refuse(verdict, program, error)
            see(Checked(before, program, olds, Provenance(), verdict, dict(lineage)))
            return verdicts
        after = side_by_side(program, ranks)
        checked = Checked(before, after, olds, Provenance(), verdict, {})
        _find(checked, pass_of(step), remarks, ranks)
        _follow(lineage, checked.found)
        checked.lineage = dict(lineage)
        if _is_unchanged(checked):
            olds = checked.news = [_kept(old, checked) for old in checked.olds]
        else:
            _isolated(checked, pass_of(step), calls, parameters)
            olds = checked.news = _run(after, calls, parameters)
        see(checked)
        before = after
    return verdicts


def _find(checked: Checked, pass_: Pass, remarks: Sequence[Remark], ranks: int) -> None:
    """Find out what stands for what after a pass, and which sites have a contract of their own."""
    hits = [remark for remark in remarks if not remark.why_not]
    names = {remark.node: remark for remark in hits}
    named = {node: OF_RANK.fullmatch(node.name) for node in checked.after.graph.nodes}
    of_ranks = {node: found[1] if found else node.name for node, found in named.items()}
    sites = {node: names[name] for node, name in of_ranks.items() if name in names}
    checked.contracts = {node: site.contract for node, site in sites.items() if site.contract}
    if pass_.name == shard.name:
        checked.found, parts = divided(checked.before, checked.after, ranks)
        checked.olds = [laid_out(old, parts, ranks) for old in checked.olds]
        return
    checked.found = provenance(checked.before, checked.after, [node.name for node in sites])


def _follow(lineage: dict[str, str], found: Provenance) -> None:
    """Say of the nodes after a pass what they stand for; nodes inside of a region for nothing."""
    inside = found.inside.difference(found.exits)
    pairs = [pair for pair in found.kept.items() if pair[0] not in inside] + found.took
    after = {new.name: lineage[was.name] for new, was in pairs if was.name in lineage}
    lineage.clear()
    lineage.update(after)


def _is_unchanged(checked: Checked) -> bool:
    """Whether the pass rewrote nothing; it may still have dropped what nobody reads."""
    found = checked.found
    every = len(found.kept) == len(checked.after.graph.nodes)
    return every and not found.took and not found.changed


def _kept(old: Recording, checked: Checked) -> Recording:
    """A recording of a program as one of what a pass left of it."""
    kept = checked.found.kept
    values = {node: old.values[was] for node, was in kept.items() if was in old.values}
    [output] = checked.after.graph.find_nodes(op="output")
    return Recording(old.twins, values, old.caches, list(output.args[0]))


def _refuse(verdict: Verdict, program: Program, error: IRError) -> None:
    """Note what verify says, after the layer of the node that it names first."""
    named = [node for node in program.graph.nodes if node.name == error.where]
    verdict.node = named[0].name if named else ""
    verdict.refused = error.within(layer_of(named[0])) if named else error


def _run(
    program: Program, calls: Sequence[RecordedCall], parameters: Parameters
) -> list[Recording]:
    made, state = list[Recording](), empty(program)
    for call in calls:
        state = {**state, **_same_types(call.state or {}, state)}
        made.append(record(program, parameters, call.feed.inputs(program), state))
        state = made[-1].caches
    return made


def _same_types(given: State, wanted: State) -> State:
    """Of caches given, those of the dtype that is wanted, in the format that is wanted."""
    return {
        name: (a, b) if a.shape == wanted[name][0].shape else (to_nz(a), to_nz(b))
        for name, (a, b) in given.items()
        if name in wanted and wanted[name][0].dtype is a.dtype
    }


def _isolated(
    checked: Checked, pass_: Pass, calls: Sequence[RecordedCall], parameters: Parameters
) -> None:
    """Run the program after a pass on the values of the program before it."""
    state = empty(checked.after)
    for i, call in enumerate(calls):
        before = checked.olds[i - 1].caches if i and call.state is None else call.state or {}
        state = {**state, **_same_types(before, state)}
        comparison = Comparison(
            checked.found, checked.verdict, pass_, call.feed, checked.olds[i], i
        )
        comparison.contracts = checked.contracts
        checked.comparisons.append(comparison)
        inputs = call.feed.inputs(checked.after)
        new = record(checked.after, parameters, inputs, state, comparison.start)
        comparison.finish()
        state = new.caches
