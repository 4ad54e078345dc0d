"""Which program takes which sequences of a step.

A fresh prompt goes to prefill, several tokens of a sequence that has a past to chunk, and one to
decode; phases that are one program go together. Decode takes any number of sequences at once; the
others do where they are told where each ends (inputs.PACKS), and take one at a time elsewhere.
"""

from collections.abc import Mapping, Sequence

from kvc8.backends.runtime.inputs import PACKS, phase_of
from kvc8.ir.program import Program

PHASES = ("prefill", "chunk", "decode")
Call = tuple[str, list[int]]  # a phase, and the places of its sequences in the batch


def calls(
    programs: Mapping[str, Program], counts: Sequence[int], lengths: Sequence[int]
) -> list[Call]:
    """The calls of a step of sequences of `lengths` tokens, `counts` of which are new."""
    by_program: dict[int, tuple[str, list[int]]] = {}
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        phase = phase_of(count, length)
        by_program.setdefault(id(programs[phase]), (phase, []))[1].append(i)
    found = []
    for phase, chosen in sorted(by_program.values(), key=lambda call: PHASES.index(call[0])):
        found += apart(programs, phase, chosen, counts)
    return found


def apart(
    programs: Mapping[str, Program], phase: str, chosen: Sequence[int], counts: Sequence[int]
) -> list[Call]:
    """Sequences of one phase: in one call, or in one for each."""
    if phase == "decode" or packs(programs[phase]):
        return [(phase, list(chosen))]
    alone = "decode" if _has_band(programs[phase]) else phase
    return [(alone if counts[i] == 1 else phase, [i]) for i in chosen]


def packs(program: Program) -> bool:
    """Whether a program can tell several sequences apart."""
    return not {node.name for node in program.inputs()}.isdisjoint(PACKS)


def _has_band(program: Program) -> bool:
    """Whether a program passes a window as a band, which a device ignores for one query row."""
    return any(node.kwargs.get("sparse_mode") == 4 for node in program.graph.nodes)
