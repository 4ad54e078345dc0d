"""Each pass's docstring is its golden test: running it on `before` must print `after`.

`pytest tests/test_pass_docs.py --bless` writes what it does print; review the difference.
"""

from functools import partial
from textwrap import dedent, indent

import pytest
from support.pass_docs import FOLDER, PASSES, load

from kvc8.ir.errors import IRError
from kvc8.ir.text import parse, show
from kvc8.passes import pipeline
from kvc8.passes.rewrite import name_of


@pytest.mark.parametrize("name", PASSES)
def test_before_becomes_after(name, request):
    step, found = load(name)
    program = parse(found[2])
    remarks = step(program)
    assert any(not remark.why_not for remark in remarks)
    if request.config.getoption("--bless"):
        path = FOLDER / f"{name}.py"
        before = indent(show(parse(found[2])), "    ")
        text = f"{found[1]}{before}{found[3]}{indent(show(program), '    ')}{found[5]}"
        path.write_text(path.read_text().replace(found[0], text, 1))
        return
    assert show(parse(found[2])) == dedent(found[2])
    assert show(program) == dedent(found[4])
    assert show(parse(found[4])) == show(program)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_runs_in_a_pipeline(name):
    tuples = [value for value in vars(pipeline).values() if isinstance(value, tuple)]
    assert name in {name_of(step) for steps in tuples for step in steps}


def test_a_pass_refuses_a_program_of_another_stage():
    step, found = load("fold_kv_scales")
    program = parse(found[4])
    with pytest.raises(IRError) as error:
        step(program)
    assert str(error.value) == (
        "fold_kv_scales: takes a quantized program and got a lowering one; "
        "check the order in passes/pipeline.py"
    )


def test_a_site_left_alone_says_why_the_program_is_refused():
    step, found = load("lower_paged_attention")
    program = parse(found[2].replace("0.5, 0, 0.0, None", "0.5, 0, 30.0, None"))
    with pytest.raises(IRError) as error:
        partial(step, phase="decode")(program)
    assert str(error.value) == (
        "lower_paged_attention: rewrote nothing (attention_0 left as it was: "
        "it caps its logits, which no attention op of the NPU does, and in other ops each step "
        "would make float copies of all pages); see the reasons"
    )
