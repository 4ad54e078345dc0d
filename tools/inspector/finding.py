"""What a finding is, and the words it is told in.

An `error` is what kvc8-compile refuses, or what makes every answer wrong; a `warning` is what makes
some runtime answer wrongly or cost more; a `note` is what someone who runs the model should know.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.errors import Sentence

if TYPE_CHECKING:  # which imports torch
    from kvc8.tools.inspector.seen import Seen

DIRECTORY, CONFIG = "the directory", "config.json"  # where a finding may be, beside layers
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `where` it is, `what` it is, what follows from it, what to do."""

    kind: str  # a short name that stays the same, for scripts
    severity: Severity
    where: str
    what: str
    so: str
    do: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, so {self.so}; {self.do}"


Check = Callable[["Seen"], Iterator[Finding]]


def inside(sentence: Sentence, directory: Path) -> str:
    """Where in a model directory an error or a warning is."""
    return sentence.where.removeprefix(place(directory)).strip("/") or DIRECTORY


def in_layers(layers: list[int]) -> str:
    """Layers in words: layer 3, layers 0-2 and 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    head = "layer" if len(layers) == 1 else "layers"
    return f"{head} {texts[0] if len(texts) == 1 else ', '.join(texts[:-1]) + ' and ' + texts[-1]}"


def numbers(found: list[int]) -> str:
    """Numbers in words: 2, 4 or 8."""
    texts = list(map(str, found))
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def plural(count: int, one: str, many: str = "") -> str:
    """A count and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
