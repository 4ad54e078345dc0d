"""kvc8-opt: what a bug report holds is run as it was, or refused in one sentence."""

import io
import sys

import pytest
from support.pass_docs import load

from kvc8.tools import command, opt


def opt_(*arguments: str) -> int:
    return command.entry(opt.parser(), opt.work, arguments)


@pytest.fixture
def before(tmp_path):
    """A file with the program before insert_kv_quant, as its docstring shows it."""
    path = tmp_path / "before.py"
    path.write_text(load("insert_kv_quant")[1][2])
    return path


def test_a_text_and_a_pass_give_the_text_after_it(before, capsys):
    assert opt_(str(before), "--passes", "insert_kv_quant") == 0
    said = capsys.readouterr()
    after = load("insert_kv_quant")[1][4]
    assert [line.strip() for line in said.out.splitlines()] == [
        line.strip() for line in after.splitlines()
    ]
    assert said.err == "insert_kv_quant: k_new_0: symmetric\n"


def test_without_a_pass_a_text_is_verified_and_written_as_it_should_be(before, capsys, monkeypatch):
    assert opt_(str(before)) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert opt_("-", "--verify") == 0
    assert capsys.readouterr().out == "-: a captured program of 2 calls, verified\n"


@pytest.mark.parametrize(
    ("phase", "has"),
    [
        ("decode", "block_table=block_table"),
        ("chunk", "aten.index_select("),
        ("prefill", "sparse_mode="),
        ("prefill-int8", "sparse_mode="),
    ],
)
def test_a_program_is_lowered_for_the_phase_that_is_named(phase, has, tmp_path, capsys):
    path = tmp_path / "lowering.py"
    path.write_text(load("lower_paged_attention")[1][2])
    assert opt_(str(path), "--passes", "lower_paged_attention", "--phase", phase) == 0
    assert has in capsys.readouterr().out


def test_what_cannot_be_read_or_run_is_refused_in_one_sentence(before, tmp_path, capsys):
    assert opt_(str(before), "--passes", "insert") == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: --passes: there is no insert; choose from remove_identities, insert_linear_quant, "
    )
    assert opt_(str(before), "--passes", "fold_kv_scales") == 1
    assert capsys.readouterr().err == (
        "error: fold_kv_scales: takes a quantized program and got a captured one; check the order "
        "in passes/pipeline.py\n"
    )
    assert opt_() == 1
    assert capsys.readouterr().err == (
        "error: kvc8-opt: no program given; name a file, - or --run DIR\n"
    )
    bad = tmp_path / "bad.py"
    bad.write_text(before.read_text().replace("aten.neg", "aten.no_op"))
    assert opt_(str(bad)) == 1
    assert capsys.readouterr().err == (
        "error: line 7: there is no op aten.no_op; correct its name\n"
    )
