"""The limits of each soc as they lie in npu/legality.json; nothing heavy is imported.

`backends/npu/legality.py` says what the rows mean, and importing it takes a second.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from kvc8.ir.errors import TargetError


def rows_of(soc: str) -> Mapping[str, list[dict[str, Any]]]:
    """The rows of each op on a soc. Raises TargetError for a soc that has no table."""
    table = json.loads(files("kvc8.backends").joinpath("npu", "legality.json").read_text())
    if soc not in table:
        known = ", ".join(sorted(table))
        raise TargetError("--soc", f"there are no limits for {soc}", f"choose one of {known}")
    found: dict[str, list[dict[str, Any]]] = table[soc]
    return found
