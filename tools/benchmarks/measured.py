"""Run a command in a process of its own and say what it took."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# A child inherits its parent's ru_maxrss, so what it took itself is read where Linux keeps that.
CODE = """
import runpy, sys
from pathlib import Path
report, module = sys.argv[1:3]
sys.argv[1:] = sys.argv[3:]
try:
    runpy.run_module(module, run_name="__main__")
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    Path(report).write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class CommandRun:
    """What a command printed and took."""

    status: int
    output: str
    wall: float  # seconds
    user: float  # seconds of processor time
    system: float  # seconds of processor time that the kernel took for it
    peak: float  # MB resident


def measured(scratch: Path, module: str, *arguments: object, threads: int = 1) -> CommandRun:
    """Run `python -m module arguments` with so many threads; `scratch` is a directory for notes.

    stderr is left where it goes.
    """
    report = scratch / "peak"
    command = [sys.executable, "-c", CODE, str(report), module, *map(str, arguments)]
    with (scratch / "output").open("w+") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, env=environment)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        peak = int(report.read_text()) * 1024 / 1e6
        taken = wall, used.ru_utime, used.ru_stime
        return CommandRun(child.returncode, output.read(), *taken, peak)
