"""kvc8-opt: what a bug report holds is run as it was, or refused in one sentence."""

import io
import sys
from itertools import product

import pytest
import torch
from support import c8
from support.pass_docs import load
from torch.fx.graph import _Namespace

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import IRError
from kvc8.ir.shapes import Shapes
from kvc8.ir.text import parse, show
from kvc8.passes import pipeline
from kvc8.passes.lower_paged_attention import lower_paged_attention
from kvc8.passes.options import Options, choices
from kvc8.passes.rewrite import pass_of
from kvc8.tools import command, opt
from kvc8.tools.driver.spelling import PASSES, steps_of


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
    ("options", "has"),
    [
        ("", "block_table=block_table"),
        ("{phase=chunk}", "aten.index_select("),
        ("{phase=prefill}", "sparse_mode="),
        ("{phase=prefill prefill_kv=int8}", "npu.npu_anti_quant("),
    ],
)
def test_a_pass_takes_options_behind_its_name(options, has, tmp_path, capsys):
    path = tmp_path / "lowering.py"
    path.write_text(load("lower_paged_attention")[1][2])
    assert opt_(str(path), "--passes", f"lower_paged_attention{options}") == 0
    assert has in capsys.readouterr().out


@pytest.mark.parametrize(
    ("passes", "sentence"),
    [
        ("lower_rope{", "lower_rope{ is no pass; write name or name{option=value}"),
        ("shard{ranks=two}", "shard: ranks is 'two' and should be a whole number; correct it"),
        ("lower_rope{a=b}", "lower_rope has no option a; leave it out"),
        ("fold_v_scale{weight=true}", "fold_v_scale has no option weight; choose from weights"),
        (
            "remove_identities,fold_v_scale{weights=no}",
            "fold_v_scale: weights is 'no' and should be 'true' or 'false'; correct it",
        ),
        (
            "lower_paged_attention{phase=decod}",
            "lower_paged_attention: phase is 'decod' and should be 'prefill' or 'chunk' or "
            "'decode'; correct it",
        ),
    ],
)
def test_a_pass_that_is_spelled_wrong_is_refused(passes, sentence, before, capsys):
    assert opt_(str(before), "--passes", passes) == 1
    assert capsys.readouterr().err == f"error: --passes: {sentence}\n"


def test_a_pass_refuses_a_mistyped_option_wherever_it_is_called():
    program = parse(load("lower_paged_attention")[1][2])
    with pytest.raises(IRError) as refused:
        lower_paged_attention(program, phase="decod")
    assert str(refused.value) == (
        "lower_paged_attention: phase is 'decod' and should be 'prefill' or 'chunk' or 'decode'; "
        "correct it"
    )


OF_SCALES = "fold", "prefill_kv"
VARIANTS = [  # what is not fused begins as what is
    Options(kv_scales="as-is"),
    Options(ranks=2, sums="half"),
    *(Options(fold=fold, prefill_kv=kv) for fold, kv in product(*map(choices, OF_SCALES))),
    Options(kv_format="nz"),
    Options(kv_scales_by="token"),
]


@pytest.mark.slow
def test_every_pass_of_every_pipeline_is_replayed_from_its_text(tiny_model, tmp_path):
    """In every pipeline variant, over two layers of a model with zero points and biases."""
    c8.quantize_model(tiny_model("qwen2", num_hidden_layers=2, head_dim=32), tmp_path / "c8")
    directory = c8.with_offsets(tmp_path / "c8", tmp_path / "offsets")
    captured = capture(open_checkpoint(directory), torch.float16)
    seen: dict[tuple[str, str], str] = {}
    last = captured, show(captured)

    def see(ran: pipeline.Ran) -> None:
        nonlocal last
        before = last[1] if ran.before is last[0] else show(ran.before)
        last = ran.after, show(ran.after)
        seen[before, ran.spelled] = last[1]

    for options in VARIANTS:
        program = captured.copy()
        pipeline.run(program, pipeline.quantize_passes(options), see)
        pipeline.lower_for_npu(program, options, see)
    assert {pass_of(step).name for _, text in seen for step in steps_of(text)} == set(PASSES)
    assert {"fold_k_scale{weights=false}", "fold_k_scale"} <= {text for _, text in seen}
    shapes = Shapes()
    for (before, text), after in seen.items():
        program = parse(before, shapes)
        [step] = steps_of(text)
        step(program)
        assert show(program) == after


def test_what_cannot_be_read_or_run_is_refused_in_one_sentence(before, tmp_path, capsys):
    assert opt_(str(before), "--passes", "insert") == 1
    said = capsys.readouterr().err
    assert said == f"error: --passes: there is no insert; choose from {', '.join(PASSES)}\n"
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


def test_names_are_forgotten_so_that_new_ones_are_those_of_the_text_alone():
    """Each name that fx itself gives next: after a pass, and after its text is read by fx."""
    program = parse("""
        def captured(x: f32[2], x_7: f32[2] = stored("a"), x_1_2: f32[2] = stored("b")):
            add: f32[2] = aten.add.Tensor(x, x_7)
            add_12: f32[2] = aten.add.Tensor(add, x_1_2)
            add_3: f32[2] = aten.add.Tensor(add_12, x)
            _1: f32[2] = aten.add.Tensor(add_3, x)
            return [_1]
        """)
    program.forget_names()
    given, by_fx = program.graph._graph_namespace, _Namespace()
    for node in program.graph.nodes:
        by_fx.create_name(node.name, None)
    asked = ("x", "x_7", "x_1", "add", "add_12", "add_3", "_1", "_", "mul", "mul_2", "add")
    assert [given.create_name(n, None) for n in asked] == [
        by_fx.create_name(n, None) for n in asked
    ]
