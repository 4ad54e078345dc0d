"""What a prompt, a chunk and a token leave in the caches, in double precision."""

from collections.abc import Mapping, Sequence

from kvc8.ir.program import Program
from kvc8.tools.verifier.recording import Parameters, State, empty, feed, record

PHASES = ("prefill", "chunk", "decode")


def replayed(
    programs: Mapping[str, Program], parameters: Parameters, tokens: Sequence[int]
) -> list[State]:
    """The caches after 7 tokens, after a chunk of all but one of the others, and after that one."""
    state, made = empty(programs["prefill"]), []
    calls = (feed(tokens[:7]), feed(tokens[7:-1], 7), feed(tokens[-1:], len(tokens) - 1))
    for phase, call in zip(PHASES, calls, strict=True):
        state = record(programs[phase], parameters, call.inputs(programs[phase]), state).caches
        made.append(state)
    return made
