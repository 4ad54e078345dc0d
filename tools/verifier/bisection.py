"""Narrow a breach down to its pass, layer and site, and write a repro of it."""

from dataclasses import dataclass
from pathlib import Path

from kvc8.ir.expression import Read
from kvc8.tools.verifier.contracts import Checked
from kvc8.tools.verifier.repro import write


@dataclass
class Bisection:
    """Watches passes being checked; writes the first breach to `folder`, where there is one."""

    folder: Path | None
    read: Read
    found: str = ""  # the breach that was written

    def see(self, checked: Checked) -> None:
        """Look at one pass."""
        if self.folder is None or self.found or not checked.verdict.sentence:
            return
        self.found = checked.verdict.sentence
        write(checked, next(iter(checked.verdict.breaches), None), self.read, self.folder)
