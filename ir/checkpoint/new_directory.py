"""Write a directory whole or not at all: beside its place, and renamed into it.

`new_directory` writes to `.<name>.<pid>.part` in the same parent. On an error the part is removed.
A process that is killed leaves its part behind, never the directory itself; whoever next writes to
that place removes the parts of dead processes.

`kept_directory` is for work of hours: what a killed or interrupted process has done stays in
`.<name>.part`, and the next one may go on with it.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvc8.ir.checkpoint.model_files import place, shown
from kvc8.ir.errors import KVC8Error, TargetError

CHUNK = 16 << 20  # bytes copied at a time
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_LINKED = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass
class PartialDirectory:
    """A directory being written."""

    path: Path
    written: int = 0  # bytes so far, for the error of a full disk

    def write(self, name: str, data: bytes) -> None:
        """Write one file and flush it to disk."""
        with (self.path / name).open("wb") as file:
            self._put(file.fileno(), data)
            os.fsync(file.fileno())

    def link(self, name: str, source: Path) -> None:
        """Make `name` a hard link to what `source` leads to, or a copy across filesystems."""
        real = source.resolve()  # a link to a link would break when its target moves
        try:
            os.link(real, self.path / name)
        except OSError as error:
            if error.errno not in NOT_LINKED:
                raise
            self._copy(name, real)

    def _copy(self, name: str, source: Path) -> None:
        with source.open("rb") as old, (self.path / name).open("wb") as new:
            while chunk := old.read(CHUNK):
                self._put(new.fileno(), chunk)
            os.fsync(new.fileno())

    def _put(self, descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.write(descriptor, view)
            self.written += count
            view = view[count:]


@contextmanager
def new_directory(out: Path) -> Iterator[PartialDirectory]:
    """A part to write; it becomes `out` at the end, or is removed where anything went wrong.

    Raises TargetError where `out` exists, cannot be written, or the disk is full.
    """
    refuse_existing(out)
    part = PartialDirectory(out.parent / f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        part.path.mkdir()
        yield part
        _move(part.path, out)
    except OSError as error:
        raise _sentence(out, part, error) from error
    finally:
        shutil.rmtree(part.path, ignore_errors=True)


@contextmanager
def kept_directory(out: Path, resume: bool) -> Iterator[tuple[PartialDirectory, Path]]:
    """A part to write that becomes `out`, and a folder for the state of the work.

    Both stay where the work is killed, interrupted or stopped by the system (a full disk); with
    `resume` the next process gets them as they are. They are removed at the end, and where the
    work itself is refused. Raises TargetError where `out` exists or cannot be written, another
    process is at work on it, or there is unfinished work and no `resume`.
    """
    refuse_existing(out)
    home = out.parent / f".{out.name}.part"
    part, state = PartialDirectory(home / "whole"), home / "state"
    if home.exists() and not part.path.exists():  # killed after the last step, the renaming
        shutil.rmtree(home)
    fresh = not home.exists()
    if not fresh and not resume:
        what = "an unfinished run is beside it"
        raise TargetError(place(out), what, f"give --resume, or remove {shown(home.name)}")
    try:
        for folder in (part.path, state):
            folder.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock, _held(lock.fileno(), out):
            yield part, state
            _move(part.path, out)
        shutil.rmtree(home)
    except OSError as error:
        raise _sentence(out, part, error) from error
    except KVC8Error:
        if fresh:
            shutil.rmtree(home, ignore_errors=True)
        raise


@contextmanager
def _held(lock: int, out: Path) -> Iterator[None]:
    """Hold a lock that its process lets go of however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TargetError(place(out), "another process writes it", "wait for it") from error
    yield


def _move(whole: Path, out: Path) -> None:
    """Flush a directory whose files are written, and give it its name."""
    for folder in [*(p for p in whole.rglob("*") if p.is_dir()), whole]:
        flush(folder)
    refuse_existing(out)
    whole.rename(out)
    flush(out.parent)


def refuse_existing(out: Path) -> None:
    """Raise TargetError where there is something at `out` already."""
    if out.exists() or out.is_symlink():
        raise TargetError(place(out), "exists already", "choose another directory or remove it")


def _remove_stale(out: Path) -> None:
    """Remove what dead processes, or one that had this one's number, left of `out`."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"(\d+)\.part")
    for path in out.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and (int(found[1]) == os.getpid() or not _alive(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def flush(folder: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sentence(out: Path, part: PartialDirectory, error: OSError) -> TargetError:
    if error.errno in FULL:
        what = f"the disk is full after {part.written / 1e6:.0f} MB"
        return TargetError(place(out), what, "free space or choose another directory")
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
        return TargetError(place(out), "exists already", "choose another directory or remove it")
    why = shown(error.strerror or error)
    return TargetError(place(out), f"cannot be written ({why})", "choose another directory")
