"""Run probes, each in a process of its own with a limit of time: a crash or a hang is a result.

Processes are forked from a server that has imported torch and the ops and never touched a device,
so that one begins in a moment and with a device that nobody has used.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvc8.tools.device_checker.machine import Machine

HUNG, CRASHED, SKIPPED = "hung", "crashed", "skipped"
PRELOADED = "kvc8.tools.device_checker.preloaded"
Opener = Callable[[int], Machine]  # of a rank, where a probe takes several


@dataclass(frozen=True)
class Probe:
    """One question: what is done, with what, and the ops that take part in it."""

    name: str
    section: str
    work: str  # a name of work.WORK
    given: Any
    ops: tuple[str, ...] = ()
    seconds: float = 60.0
    cards: int = 1  # a process for each


@dataclass(frozen=True)
class Answer:
    """A probe and what it told."""

    probe: Probe
    told: dict[str, Any]

    @property
    def outcome(self) -> str:
        """In a word."""
        return str(self.told["outcome"])


def answers(
    opener: Opener, probes: Sequence[Probe], limit: float | None = None
) -> Iterator[Answer]:
    """Run probes one after the other; an op that hung or crashed is not asked again."""
    context = get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    first = context.Process(target=_nothing)  # what the server imports takes time of no probe's
    first.start()
    first.join()
    lost: set[str] = set()
    for probe in probes:
        if dead := lost & set(probe.ops):
            yield Answer(probe, {"outcome": SKIPPED, "said": f"{sorted(dead)[0]} was lost before"})
            continue
        found = _answer(context, opener, probe, min(probe.seconds, limit or probe.seconds))
        if found["outcome"] in (HUNG, CRASHED) and len(probe.ops) == 1:
            lost |= set(probe.ops)
        yield Answer(probe, found)


def _answer(context: Any, opener: Opener, probe: Probe, limit: float) -> dict[str, Any]:
    """What rank 0 tells, or of which rank there is no answer."""
    late = time.monotonic() + limit
    with TemporaryDirectory() as meeting:
        ranks = [_start(context, opener, probe, i, Path(meeting)) for i in range(probe.cards)]
        try:
            told = [_told(process, pipe, late, limit) for process, pipe in ranks]
        finally:
            for process, pipe in ranks:
                process.join(5)
                pipe.close()
    lost = [x for word in (CRASHED, HUNG) for x in told if x["outcome"] == word]
    return [*lost, *told][0]


def _start(
    context: Any, opener: Opener, probe: Probe, rank: int, meeting: Path
) -> tuple[Any, Connection]:
    receiving, sending = context.Pipe(duplex=False)
    given = opener, probe, rank, meeting, sending
    process = context.Process(target=_in_child, args=given, daemon=True)
    process.start()
    sending.close()
    return process, receiving


def _told(process: Any, pipe: Connection, late: float, limit: float) -> dict[str, Any]:
    try:
        if pipe.poll(max(0, late - time.monotonic())):
            return dict(pipe.recv())
        process.kill()
        return {"outcome": HUNG, "said": f"no answer in {limit:.0f} s"}
    except EOFError:
        process.join(limit)
        return {"outcome": CRASHED, "said": _ended(process.exitcode)}


def _nothing() -> None:
    """Ends as soon as the server has imported all."""


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by signal {-code}"
    return f"ended with status {code}"


def _in_child(opener: Opener, probe: Probe, rank: int, meeting: Path, sending: Connection) -> None:
    from kvc8.tools.device_checker.work import told

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    given = (probe.given, rank, meeting) if probe.cards > 1 else probe.given
    sending.send(told(probe.work, opener(rank), given))
    sending.close()
