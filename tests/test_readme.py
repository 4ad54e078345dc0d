"""The commands of the README run, one after the other, and print what it says they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```sh\n(.*?)```\n((?:\n(?:    [^\n]*\n)+)*)", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?")


def blocks() -> list[tuple[str, list[str]]]:
    """Each command of the README with the lines of output that follow it."""
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [(command, [x for x in said.splitlines() if x.strip(" .")]) for command, said in found]


def shape(line: str) -> str:
    """A line without its numbers, which differ from machine to machine, and without its spacing."""
    plain = re.sub(r"layer \d+| - ", " # ", NUMBER.sub("#", line).replace("layer #", "#"))
    return " ".join(plain.split())


@pytest.mark.slow
def test_the_readme(smollm2, tmp_path):
    """In a directory of its own, which sees the model and the texts as the clone has them."""
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / smollm2.name).symlink_to(smollm2)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120"}
    ran, everything = 0, ""
    for command, wanted in blocks():
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}{done.stdout}{done.stderr}"
        said = {shape(line) for line in f"{done.stdout}{done.stderr}".splitlines()}
        assert [line for line in wanted if shape(line) not in said] == [], done.stdout
        ran, everything = ran + 1, everything + done.stdout + done.stderr
    assert ran >= 5
    assert "scattering" in everything  # why the sky is blue, as the compiled model has it
    assert "11,520 bytes, 50% of float16's 23,040" in everything
