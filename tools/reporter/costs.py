"""What a compiled program costs and why it is what it is: `--report`, `--explain` and `--json`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from kvc8.backends.npu.cost import OpCost, by_op, total
from kvc8.backends.npu.explain import Choice, explain
from kvc8.backends.npu.launches import launches
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.backends.workload import Device, Workload
from kvc8.ir.program import Program

Programs = Mapping[str, Program]  # by phase
Told = Mapping[tuple[str, str], int]  # sites by pass and why they were left alone ("": rewritten)
Figures = dict[str, float]  # of an op: what backends.npu.cost.OpCost has, and its share of bytes
BOUND = "a bound from documents; nothing was measured"


@dataclass(frozen=True)
class WithFloat16Cache:
    """What a step would cost if the cache were float16."""

    bytes_a_token: float
    seconds: float


@dataclass(frozen=True)
class Unfused:
    """What a step costs as `--fuse off` leaves it."""

    launches: int
    launches_in_a_layer: Mapping[str, int]
    bytes_a_token: float
    seconds: float


@dataclass(frozen=True)
class PhaseReport:
    """What a step of one phase costs."""

    tokens: int
    launches_in_a_layer: Mapping[str, int]  # how many layers have how many, "10": 80
    ops: Mapping[str, Figures]
    total: Figures
    bytes_a_token: float
    link_seconds: float  # of the total, what collectives take
    with_float16_cache: WithFloat16Cache
    unfused: Unfused


@dataclass(frozen=True)
class Report:
    """What each phase costs, on a device that documents describe."""

    workload: Workload
    device: Device
    note: str
    phases: Mapping[str, PhaseReport]


@dataclass(frozen=True)
class LeftAlone:
    """Sites that a pass left alone for one reason."""

    name: str
    sites: int
    why: str

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {"pass": self.name, "sites": self.sites, "why": self.why}


@dataclass(frozen=True)
class Explained:
    """Why each phase calls what it calls, and why passes left sites alone."""

    choices: Mapping[str, Sequence[Choice]]  # by phase
    left_alone: Sequence[LeftAlone]

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        choices = {phase: [c.as_json() for c in each] for phase, each in self.choices.items()}
        return {"choices": choices, "left_alone": [each.as_json() for each in self.left_alone]}


def report(programs: Programs, unfused: Programs, work: Workload, on: Device) -> Report:
    """What each phase costs, against a float16 cache and against the unfused lowering."""
    phases = {
        phase: _phase(program, unfused[phase], phase, work, on)
        for phase, program in programs.items()
    }
    return Report(work, on, BOUND, phases)


def _phase(
    program: Program, unfused: Program, phase: str, work: Workload, on: Device
) -> PhaseReport:
    each = by_op(program, phase, work, on)
    whole, plain = total(each), total(by_op(unfused, phase, work, on))
    layout = kv_layout(program)
    growth = layout.float16_bytes_per_token / layout.bytes_per_token - 1
    more = int((whole.cache_read + whole.cache_written) * growth)
    tokens = work.size(phase, "T")
    return PhaseReport(
        tokens=tokens,
        launches_in_a_layer=launches_in_a_layer(program),
        ops={name: _figures(cost, whole) for name, cost in each.items()},
        total=_figures(whole, whole),
        bytes_a_token=whole.bytes / tokens,
        link_seconds=sum(cost.seconds for cost in each.values() if cost.sent),
        with_float16_cache=WithFloat16Cache(
            (whole.bytes + more) / tokens, whole.seconds + more / on.bandwidth
        ),
        unfused=Unfused(
            plain.launches, launches_in_a_layer(unfused), plain.bytes / tokens, plain.seconds
        ),
    )


def launches_in_a_layer(program: Program) -> dict[str, int]:
    """How many layers have how many launches, "10": 80."""
    counts = Counter(each.total() for each in launches(program).values())
    return {str(count): layers for count, layers in sorted(counts.items())}


def _figures(cost: OpCost, whole: OpCost) -> Figures:
    found = {f.name: getattr(cost, f.name) for f in fields(cost)}
    return {**found, "bytes": cost.bytes, "share": cost.bytes / max(whole.bytes, 1)}


def explained(programs: Programs, told: Told, soc: str, block_size: int) -> Explained:
    """Why each phase calls what it calls, and why passes left sites alone."""
    choices = {phase: [*explain(program, soc, block_size)] for phase, program in programs.items()}
    alone = [LeftAlone(name, count, why) for (name, why), count in told.items() if why]
    return Explained(choices, alone)


def explain_lines(found: Explained) -> Iterator[str]:
    """The same as text."""
    for phase, choices in found.choices.items():
        yield f"{phase}:"
        for choice in choices:
            yield from (f"  {line}" for line in choice.lines())
    yield "left alone:"
    yield from (f"  {each.name}: {each.sites} sites: {each.why}" for each in found.left_alone)


COLUMNS = "{:<40}{:>9}{:>12}{:>11}{:>13}{:>8}{:>10}"
LINKS = "{:>10}"  # a column more, with several cards


def report_lines(found: Report) -> Iterator[str]:
    """A report as tables."""
    on, work = found.device, found.workload
    for phase, each in found.phases.items():
        what = f"{work.batch} of {work.context:,} tokens"
        yield f"{phase}, {what}: {_launches(each)}"
        head = "", "launches", "weights MB", "cache MB", "activ. MB", "share", "ms"
        yield COLUMNS.format(*head) + LINKS.format("links MB") * (work.cards > 1)
        for name, cost in [*each.ops.items(), ("total", each.total)]:
            links = LINKS.format(f"{cost['sent'] / 1e6:,.1f}") * (work.cards > 1)
            yield _row(name, cost) + links
        yield from (f"  {line}" for line in _comparisons(each, work.cards))
    rates = f"{on.bandwidth / 1e12:g} TB/s, {on.int8 / 1e12:g} TOPS in int8"
    yield f"at {rates}, {on.half / 1e12:g} TFLOPS in float16 ({on.source}); {found.note}"
    if work.cards > 1:
        rate = f"{on.link / 1e9:g} GB/s from a card to each other one"
        yield f"links at {rate} ({on.link_source}); what a collective waits is left out"


def _launches(each: PhaseReport) -> str:
    layers = [f"{n} in each of {of} layers" for n, of in each.launches_in_a_layer.items()]
    return ", ".join([f"{int(each.total['launches']):,} launches", *layers])


def _row(name: str, cost: Figures) -> str:
    cache, activations = (
        cost["cache_read"] + cost["cache_written"],
        cost["read"] + cost["written"],
    )
    megabytes = [f"{x / 1e6:,.1f}" for x in (cost["weights"], cache, activations)]
    share, time = f"{cost['share']:.1%}", f"{cost['seconds'] * 1e3:,.3f}"
    return COLUMNS.format(name, f"{int(cost['launches']):,}", *megabytes, share, time)


def _comparisons(each: PhaseReport, cards: int) -> Iterator[str]:
    seconds = each.total["seconds"]
    of = f"each of {cards} cards: " if cards > 1 else ""
    moved = f"{each.bytes_a_token / 1e6:,.1f} MB a token"
    yield f"{of}{moved}, at least {seconds * 1e3:,.3f} ms a step"
    if cards > 1:
        sent, over = f"{each.total['sent'] / 1e6:,.1f} MB", each.link_seconds
        yield f"of it sent over the links: {sent} a step, at least {over * 1e3:,.3f} ms"
    yield f"with a float16 cache: {_more(each, each.with_float16_cache)}"
    launched = f"{each.unfused.launches:,} launches"
    yield f"with --fuse off: {_more(each, each.unfused)}, {launched}"


def _more(each: PhaseReport, other: WithFloat16Cache | Unfused) -> str:
    more = f"{other.bytes_a_token / each.bytes_a_token - 1:+.1%} bytes"
    return f"{more}, {other.seconds / each.total['seconds'] - 1:+.1%} time"
