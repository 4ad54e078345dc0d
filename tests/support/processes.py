"""Several ranks as torchrun starts them, but forked from here, where torch is imported already."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def started(count: int, work: Callable[[int], int], folder: Path) -> list[tuple[int, str, str]]:
    """What each of `count` ranks ended with: exit status, stdout and stderr.

    As torchrun does, the parent keeps the store by which ranks meet, and sends a signal to those
    that still run when one has failed.
    """
    fork = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0), backlog=count) as meeting:
        ranks = [
            fork.Process(target=_rank, args=(rank, count, meeting, work, folder))
            for rank in range(count)
        ]
        for rank in ranks:
            rank.start()
        # Only now, for a thread of it looks up who connects: a rank forked meanwhile would wait
        # for ever for the resolver's lock.
        _, port = meeting.getsockname()
        file = meeting.detach()
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=file
    )
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            time.sleep(0.1)  # between two looks of torchrun
            for rank in ranks:
                rank.terminate()
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.join(30)
    late = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
    for number in late:
        ranks[number].kill()
        ranks[number].join()
    del store
    texts = [
        [(folder / f"{rank}.{end}").read_text() for end in ("out", "err")] for rank in range(count)
    ]
    assert not late, f"ranks {late} did not end within 30 s; all said {texts}"
    return [(int(r.exitcode or 0), *text) for r, text in zip(ranks, texts, strict=True)]


def _rank(
    rank: int, count: int, meeting: socket.socket, work: Callable[[int], int], folder: Path
) -> None:
    _, port = meeting.getsockname()
    meeting.close()
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        | {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    )
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(folder / f"{rank}.{end}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1 if stream is sys.stdout else 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    status = work(rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
