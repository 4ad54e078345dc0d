"""One command run by several ranks, as torchrun starts them: they speak with one voice."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

    from kvc8.backends.npu.artifact_reader import Artifact

ENDED = (
    "torchrun",
    "another rank has ended, and none can go on alone",
    "see what it said, start again",
)


@dataclass(frozen=True)
class Ranks:
    """Which of how many ranks a process is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank prints."""
        return self.rank == 0


ALONE = Ranks()


def local_device() -> int:
    """Which device of its machine a process takes, as torchrun counts them."""
    found = os.environ.get("LOCAL_RANK", "0")
    return int(found) if found.isdecimal() else 0


@contextmanager
def joined(device: "torch.device") -> Iterator[Ranks]:
    """The ranks that torchrun started, or one alone; of an error only the first to see it tells."""
    from kvc8.backends.runtime import ranks
    from kvc8.ir.errors import KVC8Error

    if not ranks.is_launched():
        yield ALONE
        return
    signal.signal(signal.SIGTERM, _end)  # what torchrun sends to those that still run
    meeting = ranks.meet()
    try:
        with ranks.lost_ranks_in_a_sentence(*ENDED):
            ranks.join(device, meeting)  # others may end while this one still connects to them
            yield Ranks(meeting.rank, meeting.size)
    except KVC8Error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
        if not meeting.may_speak():
            raise SystemExit(1) from None
        raise
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.leave()


def _end(_: int, __: object) -> NoReturn:
    from kvc8.ir.errors import TargetError

    raise TargetError(*ENDED)


def check_ranks(artifact: "Artifact", ranks: Ranks, device: "torch.device") -> None:
    """Raise TargetError unless the ranks that run are those that an artifact was compiled for."""
    from kvc8.backends.npu.artifact import identity
    from kvc8.backends.runtime.ranks import check_alike

    check_size(artifact.path, artifact.ranks, ranks)
    if ranks.size > 1:
        check_alike(identity(artifact.path), device)


def check_size(path: Path, wanted: int, ranks: Ranks) -> None:
    """Raise TargetError unless as many ranks run as a model was compiled for."""
    from kvc8.ir.errors import TargetError

    if ranks.size == wanted:
        return
    run = "runs" if ranks.size == 1 else "run"
    what = f"is compiled for {wanted} rank{'s' * (wanted > 1)} and {ranks.size} {run} it"
    start = f"torchrun --nproc-per-node {wanted} -m kvc8.tools.run"
    raise TargetError(str(path), what, f"start {('kvc8-run' if wanted == 1 else start)}")
