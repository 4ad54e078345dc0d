"""vllm-ascend's own code reads what is written for it, and not what is written for MindIE."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_directory_for_it_is_read_and_one_for_mindie_is_not(made) -> None:
    """In the latter config.json's quantization_config stops the reader before it sees C8."""
    golden, own = sorted((made / "vllm-ascend").iterdir()), made / "w8a8"
    [other] = (made / "mindie").iterdir()
    program = Path(__file__).parent / "ascend.py"  # it puts stand-ins into its process
    arguments = [program, os.environ["KVC8_ASCEND"], *golden, own, other]
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False
    )
    each = "12 W8A8, 4 float, 4 C8; 16,384 codes as the engine's own"
    assert len(golden) == 4
    *read, not_read = found.stdout.splitlines()
    assert read == [
        *(f"{directory.name}: {each}" for directory in golden),
        "w8a8: 120 W8A8, 0 float, 30 C8; 368,640 codes as the engine's own",
    ], found.stderr
    what = "not read: AssertionError: model.layers.0: its cache is not C8"
    assert not_read == f"{other.name}: {what}"
    assert found.returncode == 1
