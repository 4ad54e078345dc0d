"""What the checks share: what compile.py made, and vLLM in this process and out of it."""

import os

# The engine in this process, where what it does can be recorded.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def made() -> Path:
    """The directory that compile.py wrote."""
    return Path(os.environ["KVC8_CHECKS"])


@pytest.fixture(scope="session")
def prompts(made: Path) -> list[list[int]]:
    """The tokens of the prompts."""
    found: list[list[int]] = json.loads((made / "tokens.json").read_text())["prompts"]
    return found


@pytest.fixture(scope="session")
def generated(made: Path) -> list[list[int]]:
    """What kvc8's own loop continues them with, in float64."""
    found: list[list[int]] = json.loads((made / "tokens.json").read_text())["generated"]
    return found
