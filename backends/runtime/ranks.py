"""The processes that share one model, a rank each, as torchrun or an engine starts them.

    torchrun --nproc-per-node 8 -m kvc8.tools.run OUT --prompt "..."

They speak by torch.distributed: gloo on CPUs, HCCL on NPUs. Programs call the group of all ranks by
the name "tp".
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group

from kvc8.ir.errors import TargetError

GROUP = "tp"
# A rank that dies closes its connections, which is noticed at once. What is left is a rank that
# hangs; loading weights is the longest that one may keep others waiting.
PATIENCE = timedelta(minutes=5)
SPOKEN = "kvc8: a rank has said what is wrong"


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return bool(dist.is_torchelastic_launched())


@dataclass(frozen=True)
class Meeting:
    """Where the processes that torchrun started find each other, before they are a group."""

    store: dist.Store
    rank: int
    size: int

    def may_speak(self) -> bool:
        """Whether this rank is the first to say what is wrong; the others then say nothing."""
        try:
            return int(self.store.add(SPOKEN, 1)) == 1
        except dist.DistError:  # whoever kept the count has ended
            return True


def meet() -> Meeting:
    """Find the store that torchrun, or an engine, keeps for its ranks."""
    return Meeting(*next(iter(dist.rendezvous("env://", timeout=PATIENCE))))


def join(device: torch.device, meeting: Meeting) -> None:
    """Join the group of all processes that meet. Raises RuntimeError where one has ended."""
    dist.init_process_group(
        "hccl" if device.type == "npu" else "gloo",
        store=meeting.store,
        rank=meeting.rank,
        world_size=meeting.size,
        timeout=PATIENCE,
    )
    assert dist.group.WORLD is not None
    name_group(dist.group.WORLD)


def name_group(group: dist.ProcessGroup) -> None:
    """Let programs find a group of ranks by the name that they call."""
    _register_process_group(GROUP, group)


def leave() -> None:
    """Leave the group, at the end of what all do together."""
    dist.destroy_process_group()


def check_alike(
    parts: Mapping[str, bytes], device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Raise TargetError unless all ranks, or those of a group, have the same under each name."""
    for name, content in parts.items():
        digest = hashlib.sha256(content).digest()
        mine = torch.tensor(list(digest), dtype=torch.int64, device=device)
        each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(each, mine, group)
        others = [rank for rank, other in enumerate(each) if not torch.equal(other, each[0])]
        if others:
            what = f"rank {others[0]} has another one than rank 0"
            raise TargetError(name, what, "give all ranks one artifact, or copies of it")


def agreed(tokens: Sequence[int], device: torch.device) -> list[int]:
    """The tokens that rank 0 chose: floats summed on other ranks may round another way."""
    chosen = torch.tensor(tokens, dtype=torch.int64, device=device)
    dist.broadcast(chosen, 0)
    return [int(token) for token in chosen.tolist()]


@contextmanager
def lost_ranks_in_a_sentence(where: str, what: str, do: str) -> Iterator[None]:
    """Raise a TargetError where a collective fails because another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise TargetError(where, what, do) from error
