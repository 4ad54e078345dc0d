"""The programs in the docstrings of passes."""

import importlib
import re
from pathlib import Path

from kvc8.passes import pipeline
from kvc8.passes.rewrite import Pass

FOLDER = Path(pipeline.__file__).parent
NOT_PASSES = ("options", "pipeline", "rewrite")
PASSES = sorted(p.stem for p in FOLDER.glob("[!_]*.py") if p.stem not in NOT_PASSES)
PROGRAMS = re.compile(r"(before:\n)(.*?)(\n\nafter:\n)(.*?)(\n(?:\n(?!    )|\Z))", re.DOTALL)


def load(name: str) -> tuple[Pass, re.Match[str]]:
    module = importlib.import_module(f"kvc8.passes.{name}")
    found = PROGRAMS.search(module.__doc__ or "")
    assert found, f"{name}: its docstring has no `before:` and `after:`"
    return getattr(module, name), found
