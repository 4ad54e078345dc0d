"""What a pass is, and how one is run.

A pass is a generator that edits a program and yields a remark for each site it looked at. Calling
it runs the generator to its end, removes dead calls and unused parameters, sets the stage,
verifies, and gives the remarks. What it may do to the numbers is declared as a contract:

    bit_exact    every value it keeps is the same, bit for bit
    real_exact   equal in real numbers; floating point may round at other places
    quantizing   differs by at most the bound that the pass's module derives
    layout       the same values at other places or under another dtype that holds them exactly
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Literal, get_args, get_type_hints

from torch import Tensor
from torch.fx import Node

from kvc8.ir.errors import IRError
from kvc8.ir.program import Program, Stage
from kvc8.ir.verify import verify

Contract = Literal["bit_exact", "real_exact", "quantizing", "layout"]
# By how much each element of a node may differ from the node whose place it took: given the old
# node, the new one, and what nodes gave before rounding, as float64 (int8 for codes).
Bound = Callable[[Node, Node, Callable[[Node], Tensor]], Tensor]


@dataclass(frozen=True)
class Remark:
    """One site a pass looked at: rewritten, or left with a reason."""

    node: str
    origin: str
    why_not: str = ""
    note: str = ""  # what a reader may want to know of a site that was rewritten
    contract: Contract | None = None  # of this site, where it is not the pass's
    right: bool = False  # left alone, and as it should be: what is required of a pass is not this

    def __str__(self) -> str:
        where = f"{self.node} ({self.origin})" if self.origin else self.node
        if self.why_not:
            return f"{where} left as it was: {self.why_not}"
        return f"{where}: {self.note}" if self.note else where


def hit(node: Node, note: str = "", contract: Contract | None = None) -> Remark:
    """The site was rewritten."""
    return Remark(node.name, node.meta.get("origin", ""), note=note, contract=contract)


def miss(node: Node, why: str) -> Remark:
    """The site looked right but was left alone."""
    return Remark(node.name, node.meta.get("origin", ""), why)


def keep(node: Node, why: str) -> Remark:
    """The site was left alone, and is as it should be."""
    return Remark(node.name, node.meta.get("origin", ""), why, right=True)


@dataclass(frozen=True)
class Pass:
    """A pass: its generator and what it declares of itself."""

    body: Callable[..., Iterator[Remark]]
    takes: Stage
    gives: Stage
    contract: Contract
    required: str  # what to do when no site was rewritten; "" where that is in order
    bound: Bound | None = None  # of a quantizing pass; None: nothing may differ in real numbers
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.body.__name__)

    def __call__(self, program: Program, **options: object) -> list[Remark]:
        """Run over a program. Raises IRError, with the remarks as notes, where it does not verify."""
        self._check_options(options)
        if program.stage is not self.takes:
            what = f"takes a {self.takes.value} program and got a {program.stage.value} one"
            raise IRError(self.name, what, "check the order in passes/pipeline.py")
        remarks = list(self.body(program, **options))
        program.drop_dead_calls()
        program.drop_unused_parameters()
        program.forget_names()
        program.stage = self.gives
        try:
            self._check_hits(remarks)
            verify(program)
        except IRError as error:
            for remark in remarks:
                if remark.why_not:
                    error.add_note(f"{self.name}: {remark}")
            raise
        return remarks

    def choices(self) -> dict[str, tuple[bool | str, ...]]:
        """What each option may be that has a list of values."""
        hints = get_type_hints(self.body)
        names = [name for name in signature(self.body).parameters if name != "program"]
        each = {n: (True, False) if hints[n] is bool else get_args(hints[n]) for n in names}
        return {n: c for n, c in each.items() if c and all(isinstance(v, bool | str) for v in c)}

    def numbers(self) -> list[str]:
        """The options that are whole numbers."""
        return [name for name, hint in get_type_hints(self.body).items() if hint is int]

    def _check_options(self, options: Mapping[str, object]) -> None:
        for name, allowed in self.choices().items() if options else ():
            given = options.get(name, allowed[0])
            if given not in allowed:
                what = f"{name} is {given!r} and should be {' or '.join(map(repr, allowed))}"
                raise IRError(self.name, what, "correct it")

    def _check_hits(self, remarks: list[Remark]) -> None:
        missed = [remark for remark in remarks if remark.why_not and not remark.right]
        if self.required and len(missed) == len(remarks):
            why = f" ({remarks[0]})" if remarks else ""
            raise IRError(self.name, f"rewrote nothing{why}", f"{self.required}")


Step = Pass | partial[list[Remark]]


def pass_of(step: Step) -> Pass:
    """The pass, with or without options bound to it."""
    found = step.func if isinstance(step, partial) else step
    assert isinstance(found, Pass)
    return found


def name_of(step: Step) -> str:
    """The name of a pass, with or without options bound to it."""
    return pass_of(step).name


def written(value: bool | int | str) -> str:
    """The value of an option in a text: true, 2, or a word as it is."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def spelled(step: Step) -> str:
    """A pass and the options bound to it, as in a text: fold_v_scale{weights=false}."""
    bound = step.keywords if isinstance(step, partial) else {}
    # what is read of a checkpoint is for remarks only, and is nothing that a text could say
    said = [f"{k}={written(v)}" for k, v in bound.items() if isinstance(v, bool | int | str)]
    return name_of(step) + (f"{{{' '.join(said)}}}" if said else "")


def rewrite(
    *,
    takes: Stage,
    gives: Stage,
    contract: Contract,
    required: str = "",
    bound: Bound | None = None,
) -> Callable[[Callable[..., Iterator[Remark]]], Pass]:
    """Make a pass of a generator that edits a program and yields a remark a site."""

    def make(body: Callable[..., Iterator[Remark]]) -> Pass:
        return Pass(body, takes, gives, contract, required, bound)

    return make
