"""The report in a real browser: it opens from disk, its search works, and nothing is logged."""

import re
from functools import partial
from pathlib import Path

import pytest
from support import chromium
from support.stand_in import open_stand_in

from kvc8.tools import command
from kvc8.tools import compile as compiler
from kvc8.tools.device_checker import check
from kvc8.tools.reporter import device

pytestmark = pytest.mark.slow

LLAMA = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
PROGRAM = chromium.found()
MATCHES = "document.querySelectorAll('.box.match').length"
SHOWN = "[...document.querySelectorAll('.pass')].filter(p => p.offsetParent).length"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a compile that was checked."""
    folder = tmp_path_factory.mktemp("report")
    given = [str(LLAMA), "--target", "npu", "-o", str(folder / "out"), "--check"]
    page = ["--report", str(folder / "r.html")]
    assert command.entry(compiler.parser(), compiler.work, [*given, *page]) == 0
    return folder / "r.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("there is no Chromium here; install it to test the report in it")
    with chromium.browser(PROGRAM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_from_disk_and_fits(page, report, width, dark):
    page.open(report.as_uri(), width, dark=dark)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelectorAll('.box').length") > 100
    assert page.run("document.querySelectorAll('.heat td').length") > 20
    assert page.run("document.querySelector('.breach')") is None
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark
    assert page.requests == [report.as_uri()]
    assert page.errors == []


def test_before_and_after_stand_side_by_side_where_there_is_room(page, report):
    where = "[...document.querySelector('.sides:not(.wide)').children].map(s => s.offsetTop)"
    for width, beside in ((1280, True), (390, False)):
        page.open(report.as_uri(), width)
        page.run("document.querySelectorAll('.pass').forEach(each => each.open = true)")
        before, after = page.run(where)
        assert (before == after) is beside


def test_nodes_are_found_by_typing(page, report):
    page.open(report.as_uri())
    every = page.run(SHOWN)
    page.type("/")  # which goes to the field
    page.type("npu_rotary_mul")
    assert page.run("document.activeElement.value") == "npu_rotary_mul"
    some = page.run(SHOWN)
    assert 0 < some < every
    assert page.run("found.textContent") == f"in {some} of {every} passes"
    assert page.run(MATCHES) > 0
    found = "[...document.querySelectorAll('.box.match .t')].map(t => t.textContent)"
    assert {text.strip("+−~ ") for text in page.run(found)} >= {"npu_rotary_mul"}  # noqa: RUF001
    page.press("Escape")
    assert page.run("q.value") == ""
    assert page.run(MATCHES) == 0
    assert page.run(SHOWN) == every
    page.type("no such thing")
    assert page.run("found.textContent") == "no such node, op or module"
    assert page.errors == []


def test_a_node_of_a_layer_that_is_not_drawn_is_told_by_its_layer(page, report):
    page.open(report.as_uri())
    page.run("q.focus()")
    page.type("attention_1")
    assert page.run("found.textContent") == (
        "not drawn: attention_1 is of layer 1, and one that is like it is drawn"
    )


def test_a_box_shows_its_text_by_keys(page, report):
    found = re.search(r'href="#(pass-\d+)">insert_kv_quant<', report.read_text())
    assert found is not None
    page.open(f"{report.as_uri()}#{found[1]}")
    box = f"document.querySelector('#{found[1]} .box.new')"
    assert page.run(f"document.getElementById('{found[1]}').open") is True
    page.run(f"{box}.focus()")
    text = f"{box}.closest('figure').querySelector('.text')"
    assert page.run(f"{text}.hidden") is True
    page.press("Enter", "\r")
    assert page.run(f"{text}.textContent").startswith("quantize")
    page.press("Enter", "\r")
    assert page.run(f"{text}.hidden") is True
    assert page.errors == []


def test_the_report_of_a_device_fits(page, tmp_path):
    opener = partial(open_stand_in, ("missing",), None)
    report = check.check(
        opener,
        "ascend910b",
        tmp_path,
        lambda *_: None,
        small=True,
        sections=("ops", "assumptions", "cards"),
        only=lambda probe: probe.name in ("A1", "A13") or probe.section == "cards",
    )
    file = tmp_path / "report.html"
    file.write_text(device.render(report))
    for width in (1280, 390):
        page.open(file.as_uri(), width)
        assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelectorAll('#findings tbody tr').length") == 1
    assert page.run("document.querySelectorAll('#cards tbody tr').length") == 4
    assert (page.requests, page.errors) == ([file.as_uri()], [])
