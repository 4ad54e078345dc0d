"""The page of --report: its drawings, marks and heat, and that no name on it is markup."""

import random
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from kvc8.ir.text import parse
from kvc8.passes import pipeline
from kvc8.passes.pipeline import Ran
from kvc8.tools import command
from kvc8.tools import compile as compiler
from kvc8.tools.reporter.figures import of_contracts, of_sensitivity, of_values
from kvc8.tools.reporter.groups import alike, merged
from kvc8.tools.reporter.heat import heat
from kvc8.tools.reporter.layout import place, spread
from kvc8.tools.reporter.page import Page, render
from kvc8.tools.reporter.scenes import marks, parts, scene, shape
from kvc8.tools.reporter.steps import PassSteps
from kvc8.tools.verifier.gaps import CodeGap, Gap
from kvc8.tools.verifier.sensitivity import CacheCost
from kvc8.tools.verifier.values import PassValues, Value
from kvc8.tools.verifier.verdicts import ComparedValue, Verdict

LAYER = """
    k_{n}: f32[T, 2, 4] = aten.reshape({given}, [-1, 2, 4])  # {at}
    abs_{n}: f32[T, 2, 4] = aten.abs(k_{n})  # {at}
    k_new_{n}: f32[N, S, 2, 4] = kvc8.cache_write(k_cache_{n}, abs_{n}, slots)  # {at}
    out_{n}: f32[T, 2, 4] = kvc8.paged_attention({args}, 0.5, 0, 0.0, None)  # {at}"""
ARGS = "abs_{n}, k_new_{n}, k_new_{n}, table, lens, starts"
CACHE = 'k_cache_{n}: f32[N, S, 2, 4] = cache(stored("k{n}.scale"), None, "post-rope")'


def ran(layers=2, name="self_attn"):
    """What is seen of insert_kv_quant on layers with a cache each."""
    head = "x: f32[T, 8], slots: i32[T], table: i32[B, M], lens: i32[B], starts: i32[B + 1]"
    caches = ", ".join(CACHE.format(n=n) for n in range(layers))
    ats = [f"model.layers.{n}.{name}" for n in range(layers)]
    start = "\n    given: f32[T, 2, 4] = aten.reshape(x, [-1, 2, 4])"
    givens = ["given", *(f"out_{n}" for n in range(layers))]
    body = start + "".join(
        LAYER.format(n=n, args=ARGS.format(n=n), at=at, given=givens[n]) for n, at in enumerate(ats)
    )
    outs = ", ".join([givens[-1], *(f"k_new_{n}" for n in range(layers))])
    seen: list[Ran] = []
    program = parse(f"def captured({head}, {caches}):{body}\n    return [{outs}]")
    pipeline.run(program, (pipeline.insert_kv_quant,), seen.append)
    return seen[0]


def page(title="tiny", **given):
    steps = PassSteps()
    steps.see(ran(**given))
    return Page(title=title, facts={"target": "npu"}, steps=steps, measured="not measured")


@pytest.mark.parametrize("seed", range(5))
def test_boxes_do_not_overlap_and_edges_point_down(seed):
    draw = random.Random(seed)
    sizes = [(draw.randint(20, 200), draw.randint(20, 80)) for _ in range(24)]
    edges = [(a, b) for b in range(24) for a in range(b) if draw.random() < 0.12]
    placed = place(sizes, edges)
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(placed.corners, sizes, strict=True)]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= -1e-9
        assert right <= placed.width + 1e-9
        assert bottom <= placed.height + 1e-9
        for x, y, to_x, to_y in boxes[:i]:
            assert right <= x or to_x <= left or bottom <= y or to_y <= top
    for (a, b), route in zip(edges, placed.routes, strict=True):
        assert boxes[a][3] < boxes[b][1]
        assert route[0][1] == boxes[a][3]
        assert route[-1][1] == boxes[b][1]
        assert all(y <= to_y for (_, y), (_, to_y) in pairwise(route))


def test_an_edge_passes_between_the_boxes_of_a_row():
    """A long edge beside a chain of boxes: it may touch none of them."""
    sizes = [(100.0, 30.0)] * 4
    placed = place(sizes, [(0, 1), (1, 2), (2, 3), (0, 3)])
    for x, y in placed.routes[3][1:-1]:
        for left, top in placed.corners[1:3]:
            assert not (left <= x <= left + 100 and top <= y <= top + 30)


def test_places_are_the_nearest_in_order():
    assert spread([0, 10, 30], [5, 5], [1, 1, 1]) == [0, 10, 30]  # wanted places that fit stay
    assert spread([10, 10], [4], [1, 1]) == [8, 12]
    assert spread([10, 10], [4], [3, 1]) == [9, 13]  # the heavier gives way less
    assert spread([5, 5, 5], [2, 2], [1, 1, 1]) == [3, 5, 7]


def test_what_two_groups_would_wait_for_each_other_for_stays_apart():
    edges = [(0, 1), (1, 2), (0, 2)]
    assert merged(["a", "a", "a"], edges) == [0, 0, 0]
    assert merged(["a", None, "a"], edges) == [0, 1, 2]  # 1 reads 0 and 2 reads 1
    assert merged(["a", None, "a"], [(0, 2), (1, 2)]) == [0, 1, 0]
    assert merged(["a", "b"], [(0, 1)]) == [0, 1]
    assert merged([None, None], [(0, 1)]) == [0, 1]


def test_kinds_come_in_the_order_of_how_many_they_are():
    assert alike(["x", "y", "z", "y", "x", "y"]) == [[1, 3, 5], [0, 4], [2]]


def test_a_pass_marks_what_it_made_took_away_and_changed():
    seen = ran(1)
    before, after = ({n.name: mark for n, mark in found.items()} for found in marks(seen))
    assert before == {"k_cache_0": "changed", "k_new_0": "changed"}  # their type is another
    assert after == {
        "k_cache_0": "changed",
        "k_scale_0": "new",
        "quantize": "new",
        "k_new_0": "changed",
        "dequantize": "new",
    }
    back = Ran(seen.path, 1, seen.step, seen.spelled, seen.after, seen.before, [])
    gone, _ = marks(back)
    assert {node.name for node, mark in gone.items() if mark == "gone"} == {
        "k_scale_0",
        "quantize",
        "dequantize",
    }


def test_a_layer_is_drawn_with_what_was_left_alone_in_groups():
    seen = ran(1)
    _, after = marks(seen)
    made = scene(parts(seen.after)["layer 0"], after)
    assert [(box.kind, box.mark, box.title) for box in made.boxes] == [
        ("cache", "changed", "k_cache_0"),
        ("group", "", "self_attn"),
        ("call", "new", "kvc8.quantize"),
        ("call", "changed", "kvc8.cache_write"),
        ("call", "new", "kvc8.dequantize"),
        ("call", "", "kvc8.paged_attention"),
    ]
    assert made.boxes[1].lines == ["2 calls left alone", "reshape, abs", "← outside: given"]
    assert made.boxes[2].lines == ["quantize: i8[T, 2, 4]", "+k_scale_0"]
    assert made.boxes[3].lines == ["k_new_0: i8[N, S, 2, 4]", "slots", "→ results"]
    assert sorted(made.edges) == [(0, 3), (1, 2), (1, 5), (2, 3), (3, 4), (4, 5)]


def test_layers_are_alike_but_for_names():
    seen = ran(2)
    before, _ = marks(seen)
    found = parts(seen.before)
    layers = [shape(found[f"layer {n}"], before) for n in range(2)]
    assert layers[0] == layers[1]
    assert shape(found["layer 1"], {}) != layers[1]  # nothing of it changed


def test_of_layers_that_are_alike_one_is_drawn_and_the_lines_say_where_they_come_from():
    [step] = page(layers=3).steps.steps
    [pair] = step.pairs
    assert (pair.layer, pair.alike) == ("layer 0", "layers 0-2")
    lines = {(line.sign, line.text.partition(":")[0]): line.sources for line in pair.lines}
    assert lines["+", "quantize"] == "abs_0"
    assert lines["~", "k_new_0"] == "k_new_0"
    assert ("−", "k_new_0") in lines  # noqa: RUF001  a minus


class Read(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_whole_and_takes_nothing_from_elsewhere():
    text = render(page())
    read = Read(text)
    assert read.open == []
    names = {name for _, attrs in read.tags for name in attrs}
    assert names.isdisjoint({"src", "srcset", "action", "onclick", "onload"})
    assert {attrs["href"][0] for _, attrs in read.tags if "href" in attrs} == {"#"}
    assert "url(" not in text
    assert "@import" not in text
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "default-src 'none'" in text


def test_names_are_no_markup():
    evil = "</title><script>alert(1)</script>"
    read = Read(render(page(title=evil, name="x<img src=x onerror=alert(1)>")))
    assert [tag for tag, _ in read.tags].count("script") == 3  # the page's own
    assert "img" not in [tag for tag, _ in read.tags]


def test_a_page_has_times_only_where_they_are_asked_for():
    found = page()
    assert render(found) == render(page())
    found.seconds = [1.25]
    assert render(found) != render(page())
    assert '<td class="n">1250</td>' in render(found)


def site(layer, figure, bound, node="n"):
    return ComparedValue("decode", layer, node, "old", figure, bound, 0, Gap(0.0, 0.0))


def test_heat_is_the_largest_share_of_a_bound_in_a_layer():
    sites = [
        site("layer 0", 1.0, 4.0, "a"),
        site("layer 0", 3.0, 4.0, "b"),
        site("layer 1", 0.0, 0.0),
        site("lm_head", 6.0, 4.0),
    ]
    share = of_contracts([Verdict("lower_x", "quantizing", sites)])
    assert share.columns == ["0", "1", "rest"]
    cells = share.rows["lower_x, decode"]
    assert [(c.text, c.heat, c.breach) for c in cells.values()] == [
        ("75", 0.75, False),
        ("=", 0, False),
        ("150", 1, True),
    ]
    assert cells["0"].note == "b: 3, bound 4"


def test_rows_of_one_name_are_told_apart_and_rows_without_a_difference_are_named_only():
    same = [Verdict("p", "bit_exact", [site("layer 0", 0.0, 0.0)]) for _ in range(2)]
    share = of_contracts([*same, Verdict("q", "quantizing", [site("layer 0", 1.0, 2.0)])])
    assert share.cold == ["p, decode", "p, decode (2)"]
    assert list(share.hot) == ["q, decode"]


def test_heat_grows_with_the_logarithm():
    made = heat("t", "m", {"row": {"0": (1e-4, ""), "1": (1e-2, ""), "2": (1.0, ""), "3": (0, "")}})
    cells = made.rows["row"]
    assert [round(cells[n].heat, 9) for n in "0123"] == [0.1, 0.4, 1.0, 0]
    assert [cells[n].text for n in "0123"] == ["1e-4", "1e-2", "1e+0", "0"]


def test_errors_of_a_pass_alone_stand_beside_those_that_add_up():
    values = [
        Value("decode", "layer 0", "a", "x", Gap(9.0, 1e-3), Gap(9.0, 1e-2)),
        Value("decode", "layer 0", "b", "", Gap(9.0, 2e-3), None),
        Value("decode", "layer 1", "c", "", CodeGap((3, 1, 0), 16, 0.5), None),
        Value("decode", "layer 1", "d", "y", Gap(9.0, float("nan")), Gap(9.0, 1e-1)),
    ]
    own, codes, total = of_values([PassValues("p", values)])
    row = own.rows["p, decode"]
    assert {n: (cell.text, cell.note) for n, cell in row.items()} == {
        "0": ("2e-3", "b: 0.002"),
        "1": ("inf", "d, for y: inf"),
    }
    assert {n: cell.figure for n, cell in codes.rows["p, decode"].items()} == {"1": 0.25}
    assert {n: cell.heat for n, cell in total.rows["p, decode"].items()} == {"0": 0.1, "1": 1.0}


def test_sensitivity_is_of_each_layer_and_not_of_all():
    costs = [CacheCost("layer 0", "K", 0.25, 0.5, 1.0), CacheCost("all", "K and V", 1.0, 1.0, 0.5)]
    made = of_sensitivity(costs)
    assert {n: {c: x.figure for c, x in row.items()} for n, row in made.rows.items()} == {
        "K": {"0": 0.25}
    }


def test_a_page_is_named_by_its_ending(capsys):
    given = ["dir", "--target", "npu", "-o", "out"]
    assert compiler.parser().parse_args([*given, "--report"]).report is True
    assert compiler.parser().parse_args(given).report is None
    assert str(compiler.parser().parse_args([*given, "--report", "r.html"]).report) == "r.html"
    with pytest.raises(SystemExit):
        command.entry(compiler.parser(), compiler.work, ["--report", *given])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "kvc8-compile: error: argument --report: dir is no .html file; to print, put --report last"
    )
