"""docs/models.md: it has every architecture that is tried, and counts what it shows."""

from pathlib import Path

import pytest
from support.architectures import captured, others

DOC = Path(__file__).parent.parent / "docs" / "models.md"
TEXT = DOC.read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1:]
    for line in TEXT.splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line[1:-1].split(" | ")])
}
SHOWN = {name: cells for name, cells in ROWS.items() if name != "architecture"}
EXACT = {name for name, (off, *_) in SHOWN.items() if off != "no" and float(off) <= 1e-5}


def test_every_architecture_has_a_row():
    assert set(SHOWN) == {*captured(64), *others(64)}


@pytest.mark.parametrize("name", captured(64))
def test_what_the_tests_hold_to_transformers_is_said_to_be_exact(name):
    assert name in EXACT


def test_a_refusal_says_why():
    for name, (*tried, why) in SHOWN.items():
        assert ("no" in tried) == bool(why), name
        assert "Traceback" not in why


def test_its_counts_are_those_of_its_rows():
    npu = sum(cells[3] == "yes" for cells in SHOWN.values())
    onnx = sum(cells[4] == "yes" for cells in SHOWN.values())
    said = f"{len(SHOWN)} architectures: {len(EXACT)} captured within 1e-5 of transformers, "
    assert f"{said}{npu} reach the NPU, {onnx} ONNX Runtime." in TEXT
    assert len(EXACT) >= 45
    assert npu >= 40


def test_the_readmes_say_how_many_there_are():
    for name in ("README.md", "README.zh-CN.md"):
        assert f" {len(SHOWN)} " in (DOC.parent.parent / name).read_text(encoding="utf-8")
