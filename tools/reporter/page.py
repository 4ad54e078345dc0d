"""One HTML page that needs nothing else: what was compiled, what each pass did, figures, costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvc8.backends.npu.explain import Choice
from kvc8.ir.errors import TargetError
from kvc8.tools.reporter.costs import LeftAlone, Report
from kvc8.tools.reporter.heat import Heat
from kvc8.tools.reporter.steps import PassSteps, StepFacts

MEASURED = (
    "Measured on recorded tokens, a prompt, a chunk and a decode step, where each pass ran; "
    "NPU ops are emulated."
)
PATHS = {
    "": "all phases, up to an int8 cache",
    "int8": "phases that read the int8 cache",
    "prefill": "prefill",
    "chunk": "chunk",
    "decode": "decode",
}


@dataclass
class Page:
    """What a page tells, in its order."""

    title: str
    facts: Mapping[str, str]
    steps: PassSteps
    seconds: Sequence[float] | None = None  # of each pass; a page with times differs run by run
    heats: Sequence[Heat] = ()
    measured: str = ""  # what the heats were measured on, or why there are none
    choices: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    left_alone: Sequence[LeftAlone] = ()
    cost: Report | None = None
    absent: str = "This was not compiled for an NPU."  # why there are no choices and no cost


def write(page: Page, path: Path) -> int:
    """Write a page; gives its size in bytes. Raises TargetError where it cannot be written."""
    text = render(page).encode()
    try:
        path.write_bytes(text)
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise TargetError(str(path), what, "name a file in a directory that exists") from error
    return len(text)


def render(page: Page) -> str:
    """A page as text."""
    folder = resources.files("kvc8.tools.reporter")
    read = {
        name: (folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    }
    env = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["mb"] = lambda value: f"{value / 1e6:,.1f}"
    return env.from_string(read["page.html"]).render(
        page=page,
        sections=_sections(page.steps.steps),
        lines=list(page.steps.lines),
        names={part: " ".join(names) for part, names in page.steps.names.items()},
        most=max((max(step.nodes) for step in page.steps.steps), default=1),
        css=Markup(read["page.css"]),
        js=Markup(read["page.js"]),
    )


def _sections(steps: Sequence[StepFacts]) -> list[tuple[str, list[tuple[int, StepFacts]]]]:
    """The passes by what they are of, each with its place among all."""
    found: dict[str, list[tuple[int, StepFacts]]] = {}
    for i, step in enumerate(steps):
        found.setdefault(PATHS.get(step.path, step.path), []).append((i, step))
    return list(found.items())
