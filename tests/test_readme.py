"""The commands of the README run, one after the other, and print what it says they print."""

import gc
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from support.steps import step, values

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.run import run
from kvc8.passes import pipeline
from kvc8.tools.driver.tokenizer import read_tokenizer

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n((?:\n(?:    [^\n]*\n)+)*)", re.DOTALL)
TEXTS = "tests/data/calibration.jsonl"
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?")


# The one that is told to run by itself: with a note of the memory that it takes, in kB.
WATCHED = "kvc8-quantize"
WATCH = """#!{python}
import runpy, re
try:
    runpy.run_path({command!r}, run_name="__main__")
finally:
    with open("/proc/self/status") as status, open({note!r}, "w") as note:
        note.write(re.search("VmHWM:(.*) kB", status.read())[1])
"""


def blocks() -> list[tuple[str, str, list[str]]]:
    """Each command of the README: sh or python, what it is, and the lines of output below it."""
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [
        (kind, command, [x for x in said.splitlines() if x.strip(" .")])
        for kind, command, said in found
    ]


@pytest.fixture
def run_block(tmp_path, monkeypatch, capsys) -> Callable[[str, str], str]:
    """`run_block(kind, command)`: all that a command says, run in a directory of its own.

    kvc8's commands are called here, by the entry points that are installed, for to import torch and
    transformers anew for each would take a quarter of the time. Others, and that which is watched,
    are left to bash.
    """
    bin, here = tmp_path / "bin", Path(sys.executable).parent
    bin.mkdir()
    given = {"python": sys.executable, "command": str(here / WATCHED), "note": str(tmp_path / "kB")}
    (bin / WATCHED).write_text(WATCH.format(**given))
    (bin / WATCHED).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{bin}:{here}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "120")
    commands = {point.name: point for point in entry_points(group="console_scripts")}

    def run_block(kind: str, command: str) -> str:
        if kind == "python":
            exec(compile(command, "README.md", "exec"), {"__name__": "__main__"})
        elif (words := shlex.split(command.replace("\\\n", " ")))[0] in {*commands} - {WATCHED}:
            monkeypatch.setattr(sys, "argv", words)
            assert commands[words[0]].load()() == 0, capsys.readouterr()
        else:
            done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{command}{done.stdout}{done.stderr}"
            return done.stdout + done.stderr
        said = capsys.readouterr()
        return said.out + said.err

    yield run_block
    gc.enable()  # which kvc8-compile does without


def shape(line: str) -> str:
    """A line without its numbers, which differ from machine to machine, and without its spacing."""
    plain = re.sub(r"layer \d+| - ", " # ", NUMBER.sub("#", line).replace("layer #", "#"))
    return " ".join(plain.split())


HELD_OUT = """The bakery on Cooper Lane opens at five, long before the first bus. Nadia lights the \
ovens, weighs the flour and lets the radio talk to itself. By six the windows are white with steam \
and somebody is always waiting outside, stamping their feet. She knows most of them by what they \
buy: two rolls and a paper, a rye loaf cut thin, the boy who counts his coins twice. In winter she \
keeps a pot of soup behind the counter and forgets to charge for it. Her accountant has written \
her three letters about that. The formula is not complicated, he says: revenue minus cost is \
profit, and soup is a cost. She has pinned the letters above the sink, where the steam has made \
the ink run, so that only the word "kindly" can still be read."""


def logits(directory: Path, tokens: list[int], passes) -> torch.Tensor:
    """The log probabilities that a model gives after some passes, computed in float32."""
    program = capture(open_checkpoint(directory), torch.float32)
    if passes:
        pipeline.run(program, passes)
    made = values(program, directory, blocks=1, block=len(tokens))
    given = step(tokens, [0], [len(tokens)], [[0]], block=len(tokens))
    return run(program, {**made, **given})[0].log_softmax(-1)


def divergence(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want.exp() * (want - got)).sum(-1).mean())


@pytest.mark.slow
def test_the_readme(smollm2, tmp_path, run_block):
    """In a directory of its own, which sees the model as the clone has it.

    And a quarter of the texts: all of them, each seen twice, would be most of this test's time.
    """
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / smollm2.name).symlink_to(smollm2)
    (tmp_path / "tests/data").mkdir(parents=True)
    texts = (ROOT / TEXTS).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / TEXTS).write_text("".join(texts[::4]), encoding="utf-8")
    ran, everything = 0, ""
    for kind, command, wanted in blocks():
        said = run_block(kind, command)
        shapes = {shape(line) for line in said.splitlines()}
        assert [line for line in wanted if shape(line) not in shapes] == [], said
        ran, everything = ran + 1, everything + said
    assert ran >= 6
    assert "scattering" in everything.lower()  # why the sky is blue, as the compiled model has it
    assert "11,520 bytes, 50% of float16's 23,040" in everything
    encode = read_tokenizer(smollm2).encode
    seen, whole = (
        sum(len(encode(json.loads(x)["text"])) for x in of) for of in (texts[::4], texts)
    )
    assert f"measured on {seen:,} tokens" in everything
    assert f"measured on {whole:,} tokens" in (ROOT / "README.md").read_text(encoding="utf-8")
    # What the default recipe is held to, on a text that it has not seen; and half of what
    # msModelSlim takes on 8 texts of BoolQ (1,316 tokens), in MB, which are as many and longer.
    assert seen < 1_316
    tokens = encode(HELD_OUT)
    made = logits(tmp_path / "smol-w8a8c8", tokens, pipeline.QUANTIZE)
    assert divergence(logits(smollm2, tokens, ()), made) < 0.02
    assert int((tmp_path / "kB").read_text()) * 1024 / 1e6 < 655
