"""vllm-ascend's own code reads what is written for it, and not what is written for MindIE."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def read(directories: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """ascend.py, which puts stand-ins into its process."""
    program = Path(__file__).parent / "ascend.py"
    arguments = [program, os.environ["KVC8_ASCEND"], *directories]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_every_directory_for_it_is_read(made) -> None:
    golden = sorted((made / "vllm-ascend").iterdir())
    found = read([*golden, made / "w8a8"])
    assert found.returncode == 0, found.stdout + found.stderr
    each = "12 W8A8, 4 float, 4 C8; 16,384 codes as the engine's own"
    own = "w8a8: 120 W8A8, 0 float, 30 C8; 368,640 codes as the engine's own"
    lines = [*(f"{directory.name}: {each}" for directory in golden), own]
    assert len(golden) == 4
    assert found.stdout.splitlines() == lines


def test_one_for_mindie_is_not(made) -> None:
    """config.json's quantization_config stops the reader before it sees that the cache is C8."""
    [directory] = (made / "mindie").iterdir()
    found = read([directory])
    assert found.returncode == 1
    what = "AssertionError: model.layers.0: its cache is not C8"
    assert found.stdout == f"{directory.name}: not read: {what}\n"
