"""The page of kvc8-device-check: what holds of a device, what does not, and how fast it is."""

from collections import Counter
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render(report: Mapping[str, Any]) -> str:
    """The page of a report."""
    folder = resources.files("kvc8.tools.reporter")
    env = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    facts = {**report["facts"], "cards": report["cards"], "kvc8": report["kvc8"]}
    outcomes = sorted({outcome for counts in report["counts"].values() for outcome in counts})
    return env.from_string((folder / "device.html").read_text("utf-8")).render(
        title=str(facts.pop("SoC", report["soc"])),
        facts=facts,
        report=report,
        outcomes=outcomes,
        verdicts=Counter(each["verdict"] for each in report["assumptions"]),
        css=Markup((folder / "page.css").read_text("utf-8")),
    )
