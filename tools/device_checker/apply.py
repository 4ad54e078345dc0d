"""What a report would change: legality.json and docs/device.md as a diff, and the emulation."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvc8.backends.npu.emulation import module_of
from kvc8.ir.checkpoint.model_files import read_json
from kvc8.ir.errors import TargetError
from kvc8.tools.device_checker.check import FORMAT
from kvc8.tools.device_checker.findings import LAX, STRICT, UNKNOWN

ROOT = Path(__file__).resolve().parent.parent.parent
LEGALITY, DOCUMENT = "backends/npu/legality.json", "docs/device.md"
Row = dict[str, Any]


def read_report(path: Path) -> dict[str, Any]:
    """A report. Raises TargetError where it is of another format."""
    found = dict(read_json(path))
    if found.get("format") != FORMAT:
        what = f"is no report of format {FORMAT}"
        raise TargetError(str(path), what, "make it with kvc8-device-check of this version")
    return found


def changes(report: Mapping[str, Any], root: Path = ROOT) -> Iterator[str]:
    """The lines of the diffs, and a line for each emulated op that computes something else."""
    for name, change in ((LEGALITY, with_rows), (DOCUMENT, with_verdicts)):
        path = root / name
        if not path.is_file():
            yield f"{name}: does not lie beside kvc8; run this in a clone of its repository"
            continue
        old = path.read_text("utf-8")
        lines = old.splitlines(), change(old, report).splitlines()
        yield from difflib.unified_diff(*lines, f"a/{name}", f"b/{name}", n=0, lineterm="")
    for each in report["findings"]:
        if each["kind"] == "assumption":
            yield f"{module_of(each['op'])}: {each['name']}: {each['what']}"


def with_rows(text: str, report: Mapping[str, Any]) -> str:
    """legality.json with each row changed that a device found too strict or too lax."""
    lines = text.splitlines()
    for each in report["findings"]:
        if each["kind"] in (STRICT, LAX) and each["change"]:
            at = _line_of(lines, report["soc"], each["op"], each["change"]["row"])
            comma = "," * lines[at].endswith(",")
            row = changed(json.loads(lines[at].rstrip(",")), each["kind"], each["change"]["value"])
            indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            lines[at] = f"{indent}{json.dumps(row, ensure_ascii=False)}{comma}"
    return "\n".join(lines) + "\n"


def _line_of(lines: list[str], soc: str, op: str, row: int) -> int:
    """The line of a row; the file has one row a line."""
    start = next(i for i, line in enumerate(lines) if line.strip() == f'"{soc}": {{')
    first = next(i for i in range(start, len(lines)) if lines[i].strip() == f'"{op}": [')
    return first + 1 + row


def changed(row: Row, kind: str, value: Any) -> Row:
    """A row that takes the value (too strict) or does not (too lax)."""
    new = dict(row)
    if "one_of" in row:
        listed = [x for x in row["one_of"] if x != value]
        new["one_of"] = [*row["one_of"], value] if kind == STRICT else listed
    elif not isinstance(value, int):
        new["source"] = f"{row['source']}; a device {_does(kind)} {value}"
    elif kind == LAX:
        new["max"] = value - row.get("multiple", 1)
    else:
        _widen(new, value)
    return new


def _widen(row: Row, value: int) -> None:
    """Make ends and steps of a row such that it takes the value."""
    if "max" in row:  # a name stands for a number of the code's, which others read too
        row["max"] = value if isinstance(row["max"], str) else max(row["max"], value)
    if "min" in row:
        row["min"] = min(row["min"], value)
    if value % row.get("multiple", 1):
        row["multiple"] = next(
            step for step in range(row["multiple"], 0, -1)
            if not (value % step or row["multiple"] % step)
        )  # fmt: skip


def _does(kind: str) -> str:
    return "takes" if kind == STRICT else "refuses"


def with_verdicts(text: str, report: Mapping[str, Any]) -> str:
    """docs/device.md with what the device says of each assumption in place of its last column."""
    soc = report["facts"].get("SoC", report["soc"])
    said = {f"| A{each['number']} |": each for each in report["assumptions"]}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        each = next((said[mark] for mark in said if line.startswith(mark)), None)
        if each is None or each["verdict"] == UNKNOWN:
            continue
        figure = f", {each['figure']}" if each["verdict"] == "no" else ""
        head = line.rstrip(" |").rpartition(" | ")[0]
        lines[i] = f"{head} | {each['verdict']} on {soc}{figure} |"
    return "\n".join(lines) + "\n"
