"""A process for a piece of work, forked from here, where torch and transformers are imported."""

import os
import sys
import traceback
from collections.abc import Callable


def started(work: Callable[[], int], out: int | None = None, err: int | None = None) -> int:
    """The number of a process that does the work and ends with its status.

    What it prints goes to the descriptors `out` and `err`; nowhere by default.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70  # that no command ends with
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for given, end in ((out, 1), (err, 2)):
            os.dup2(nowhere if given is None else given, end)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  Python's own ones are pytest's
        status = work()
        sys.stdout.flush()  # as Python does at its end
    except BaseException:
        traceback.print_exc()
        status = 70
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a process and give its status, below zero where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
