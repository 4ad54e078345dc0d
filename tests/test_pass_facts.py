"""What is told of a pass that ran: its sites and reasons, calls, bytes, and nodes' sources."""

import pytest

from kvc8.ir.errors import IRError
from kvc8.ir.text import parse, show
from kvc8.passes import pipeline
from kvc8.passes.pipeline import Ran
from kvc8.passes.rewrite import Remark
from kvc8.tools.reporter import pass_dump
from kvc8.tools.reporter.pass_facts import counts, sizes, sources, summary

LAYER = """
    k_{n}: f32[T, 2, 4] = aten.reshape(x, [-1, 2, 4])  # {at}
    k_new_{n}: f32[N, S, 2, 4] = kvc8.cache_write(k_cache_{n}, k_{n}, slots)  # {at}
    out_{n}: f32[T, 2, 4] = kvc8.paged_attention({args}, 0.5, 0, 0.0, None)  # {at}"""
ARGS = "k_{n}, k_new_{n}, k_new_{n}, table, lens, starts"
CACHE = 'k_cache_{n}: f32[N, S, 2, 4] = cache(stored("k{n}.scale"), None, "post-rope")'


def program(layers, scaled):
    """Layers with a cache each, of which those in `scaled` have a scale."""
    caches = [CACHE.format(n=n) for n in layers]
    caches = [
        c if n in scaled else c.partition(" =")[0] + " = cache()" for n, c in enumerate(caches)
    ]
    head = "x: f32[T, 8], slots: i32[T], table: i32[B, M], lens: i32[B], starts: i32[B + 1], "
    body = "".join(
        LAYER.format(n=n, args=ARGS.format(n=n), at=f"model.layers.{n}.self_attn") for n in layers
    )
    outs = ", ".join(f"{kind}_{n}" for kind in ("out", "k_new") for n in layers)
    return parse(f"def captured({head}{', '.join(caches)}):{body}\n    return [{outs}]")


def ran(layers=range(3), scaled=(0, 2)):
    """What is seen of insert_kv_quant."""
    seen = []
    pipeline.run(program(layers, scaled), (pipeline.insert_kv_quant,), seen.append)
    [found] = seen
    return found


def test_a_pass_is_shown_with_copies_of_both_programs():
    before = show(program(range(3), (0, 2)))
    found = ran()
    assert (found.path, found.number, found.step.name) == ("", 1, "insert_kv_quant")
    assert show(found.before) == before
    assert show(found.after).startswith("def quantized(")


def test_passes_of_a_run_are_numbered_and_what_one_made_is_what_the_next_was_given():
    seen = []
    told = pipeline.run(program(range(2), (0, 1)), pipeline.AS_IS, seen.append, "here", 4)
    count = len(pipeline.AS_IS)
    assert [(each.path, each.number) for each in seen] == [("here", 5 + i) for i in range(count)]
    assert seen[0].after is seen[1].before
    assert [remark for each in seen for remark in each.remarks] == [remark for _, remark in told]


def test_sites_are_summed_by_layer_and_by_reason():
    found = ran()
    assert summary(found) == [
        "2 sites in 2 of 3 layers",
        "layer 1: 1 site left because the checkpoint has no scale for this cache",
    ]


def test_layers_are_told_as_ranges_and_the_rest_by_name():
    found = ran(range(6), range(6))
    remarks = [Remark("a", f"model.layers.{n}.mlp", "why") for n in (0, 1, 2, 4)]
    remarks += [Remark("b", "lm_head", "why"), Remark("c", "", "its weight is float")]
    found = Ran("", 1, found.step, found.spelled, found.before, found.after, remarks)
    assert summary(found) == [
        "0 sites in 0 of 6 layers",
        "layers 0-2, 4, lm_head: 5 sites left because why",
        "c: 1 site left because its weight is float",
    ]


def test_a_new_node_comes_from_what_it_replaced_or_from_what_it_serves():
    found = sources(ran(range(1), (0,)))
    assert found == {
        "k_cache_0": ("k_cache_0",),  # its type is another
        "k_scale_0": ("k_cache_0",),
        "quantize": ("k_0",),
        "k_new_0": ("k_new_0",),
        "dequantize": ("k_new_0",),
    }


def test_calls_and_bytes_are_counted():
    found = ran(range(2), (0, 1))
    assert counts(found.before) == {
        "aten.reshape": 2,
        "kvc8.cache_write": 2,
        "kvc8.paged_attention": 2,
    }
    assert (counts(found.after) - counts(found.before)) == {
        "kvc8.quantize": 2,
        "kvc8.dequantize": 2,
    }
    was, now = sizes(found.before), sizes(found.after)
    assert (str(was.caches), str(now.caches)) == ("64*N*S", "16*N*S")
    assert (was.parameters, now.parameters) == (0, 2 * 2 * 4 * 4)
    assert str(was.activations) == "64*N*S + 128*T"
    assert str(now.activations) == "80*N*S + 144*T"


def test_a_dump_has_every_pass_and_stops_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pass_dump, "LIMIT", 400)
    given = program(range(3), (0, 2))
    pipeline.run(given, (pipeline.insert_kv_quant,), pass_dump.writer(tmp_path))
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files.keys() == {"00-captured.py"} | {
        f"01-insert_kv_quant.{end}" for end in ("py", "diff", "txt", "sources.txt")
    }
    assert files["01-insert_kv_quant.py"] == show(given) + "\n"
    lines = files["01-insert_kv_quant.diff"].splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert lines[-1].startswith("... and ")
    assert lines[-1].endswith(" lines more, left out")
    assert len("\n".join(lines[:-1])) < 400
    assert "quantize <- k_0\n" in files["01-insert_kv_quant.sources.txt"]


def test_a_pass_that_fails_is_not_shown():
    seen = []
    with pytest.raises(IRError):
        pipeline.run(program(range(1), ()), (pipeline.insert_kv_quant,), seen.append)
    assert seen == []
