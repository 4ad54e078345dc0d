"""What a probe does in its process, and what it tells: numbers and words only."""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from kvc8.ir.errors import KVC8Error
from kvc8.ir.npu import SCHEMAS
from kvc8.tools.device_checker import collectives, models, vectors
from kvc8.tools.device_checker.assumptions import NUMBERED
from kvc8.tools.device_checker.bounds import within
from kvc8.tools.device_checker.calls import SpelledCall, tensors
from kvc8.tools.device_checker.comparison import apart
from kvc8.tools.device_checker.machine import Machine, emulated, results

Told = dict[str, Any]
REFUSED, NOT_TRIED = "refused", "not tried"
REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError, KVC8Error)
CODE = re.compile(r"\b(?:E[A-Z]?\d{4,5}|[1-5]\d{5})\b")  # CANN's, and those of its runtime
WARM, TIMED = 3, 10


def refusal(error: Exception) -> Told:
    """That an op did not take a call: its code, and the first line without what names a place."""
    text = str(error)
    code = CODE.search(text)
    words = [w for w in text.strip().partition("\n")[0].split() if not re.search(r"[/\\@]", w)]
    said = " ".join(words)[:160]
    return {"outcome": REFUSED, "code": code[0] if code else "", "said": said}


def ops(machine: Machine, _: object) -> Told:
    """Which ops the machine lacks, and which have another schema."""
    wanted = {schema.partition("(")[0]: schema for schema in SCHEMAS}
    found = {name: machine.schema(name) for name in wanted}
    return {
        "outcome": "done",
        "facts": dict(machine.facts),
        "cards": machine.cards,
        "missing": [name for name, schema in found.items() if schema is None],
        "other": {n: s for n, s in found.items() if s is not None and s != wanted[n]},
    }


def vector(machine: Machine, given: tuple[str, str, bool]) -> Told:
    """A vector of the vendor's."""
    golden, name = Path(given[0]), given[1]
    case = vectors.cases(golden)[name]
    inputs, expected = vectors.load(case, golden)
    with machine.running():
        got = vectors.run(case, {n: t.to(machine.device, copy=True) for n, t in inputs.items()})
        machine.synchronize()
    on_cpu = {name: tensor.cpu() for name, tensor in got.items()}
    names = [out["name"] for out in case["outputs"]]
    found = apart([on_cpu[n] for n in names], [expected[n] for n in names])
    passed = vectors.passes(case, on_cpu, expected)
    return {"outcome": found.outcome, "figure": found.figure, "passed": passed}


def assumption(machine: Machine, number: int) -> Told:
    """Whether an assumption holds."""
    each = NUMBERED[number]
    values = each.values()
    allowed = within(each.op, values)
    found = apart(machine.run(each.call, values), emulated(each.call, values), allowed)
    return {"outcome": found.outcome, "figure": found.figure, "holds": each.holds(found, allowed)}


def call(machine: Machine, given: tuple[SpelledCall, bool]) -> Told:
    """Whether a call is taken; a legal one is compared with the emulation.

    A legal call that is not emulated is not tried: its arguments may not fit together.
    """
    made, legal = given
    values = tensors(made)
    if not legal:
        machine.run(made, values)
        return {"outcome": "taken"}
    try:
        want = emulated(made, values)
    except REFUSALS:
        return {"outcome": NOT_TRIED}
    found = apart(machine.run(made, values), want, within(made.op, values))
    return {"outcome": found.outcome, "figure": found.figure}


def model(machine: Machine, given: tuple[str, str]) -> Told:
    """A compiled form of the tiny model, node by node."""
    return models.compared(machine, Path(given[0]), given[1])


def timed(machine: Machine, given: SpelledCall) -> Told:
    """The median time of a call, of several on the same tensors."""
    values = tree_map_only(Tensor, lambda x: x.to(machine.device), tensors(given))
    seconds = []
    with machine.running():
        for _ in range(WARM + TIMED if not machine.small else 2):
            start = time.perf_counter()
            results(given, values)
            machine.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"outcome": "done", "seconds": statistics.median(seconds[1:])}


def sum_of_cards(machine: Machine, given: tuple[collectives.TimedSum, int, Path]) -> Told:
    """The time of a sum over several cards, of which this is one."""
    return collectives.summed(machine, *given)


WORK: Mapping[str, Callable[[Machine, Any], Told]] = MappingProxyType(
    {
        "ops": ops,
        "vector": vector,
        "assumption": assumption,
        "call": call,
        "model": model,
        "timed": timed,
        "sum": sum_of_cards,
    }
)


def told(work: str, machine: Machine, given: Any) -> Told:
    """What a probe tells; a refused call is a result."""
    try:
        return WORK[work](machine, given)
    except REFUSALS as error:
        return refusal(error)
