"""Passes by name, with options, as kvc8-opt takes them and dumps write them.

insert_kv_quant,lower_paged_attention{phase=prefill prefill_kv=int8},fold_v_scale{weights=false}
"""

import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from kvc8.ir.errors import ModelError
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.rewrite import Pass, Step, pass_of, written

SPELLED = re.compile(r"(?P<name>\w+)(?:\{(?P<options>[^{}]*)\})?")
BETWEEN = re.compile(r",(?![^{]*\})")  # commas outside of braces


def _every() -> dict[str, Pass]:
    """Each pass of any pipeline, by name."""
    by_token = Options(kv_scales_by="token")
    steps = [*pipeline.quantize_passes(Options(ranks=2)), *pipeline.quantize_passes(by_token)]
    for options in (Options(fold="kv"), Options(fold="kv", kv_format="nz"), by_token):
        for shared, own in pipeline.phases(options).values():
            steps += [*shared, *own]
    return {pass_of(step).name: pass_of(step) for step in steps}


PASSES: Mapping[str, Pass] = MappingProxyType(_every())


def steps_of(text: str) -> list[Step]:
    """The passes that a text names, their options bound; raises ModelError where it is wrong."""
    return [_step(part.strip()) for part in BETWEEN.split(text) if part.strip()]


def _step(part: str) -> Step:
    found = SPELLED.fullmatch(part)
    if not found:
        raise ModelError("--passes", f"{part} is no pass", "write name or name{option=value}")
    if found["name"] not in PASSES:
        names = ", ".join(PASSES)
        raise ModelError("--passes", f"there is no {found['name']}", f"choose from {names}")
    chosen = PASSES[found["name"]]
    options = dict(_option(chosen, pair) for pair in (found["options"] or "").split())
    return partial(chosen, **options) if options else chosen  # type: ignore[arg-type]


def _option(chosen: Pass, pair: str) -> tuple[str, bool | int | str]:
    """An option of a pass and its value, one of those that its type allows."""
    name, _, value = pair.partition("=")
    allowed, numbers = chosen.choices(), chosen.numbers()
    if name not in (*allowed, *numbers):
        known = ", ".join((*numbers, *allowed))
        do = f"choose from {known}" if known else "leave it out"
        raise ModelError("--passes", f"{chosen.name} has no option {name}", do)
    if name in numbers:
        if not value.isdecimal():
            what = f"{chosen.name}: {name} is {value!r} and should be a whole number"
            raise ModelError("--passes", what, "correct it")
        return name, int(value)
    found = {written(each): each for each in allowed[name]}
    if value not in found:
        what = f"{name} is {value!r} and should be {' or '.join(map(repr, found))}"
        raise ModelError("--passes", f"{chosen.name}: {what}", "correct it")
    return name, found[value]
