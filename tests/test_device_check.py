"""kvc8-device-check on a stand-in: nothing is found where nothing is planted, and each fault is."""

import difflib
import getpass
import json
import socket
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from support.stand_in import FAULTS, open_stand_in

from kvc8.backends.npu.legality import breaks, limits
from kvc8.backends.workload import Device
from kvc8.tools import command, device_check
from kvc8.tools.device_checker import apply, check, collectives, findings, models, runner, timings
from kvc8.tools.device_checker.assumptions import NUMBERED, table
from kvc8.tools.device_checker.bounds import Within, within
from kvc8.tools.device_checker.calls import facts_of, tensors
from kvc8.tools.device_checker.comparison import BY_MORE, BY_ONE, EQUAL, apart
from kvc8.tools.device_checker.findings import ASSUMPTION, DIFFERS, LAX, LOST, MISSING, STRICT
from kvc8.tools.device_checker.machine import emulated
from kvc8.tools.device_checker.work import refusal
from kvc8.tools.reporter import device

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SOC = "ascend910b"
NZ = f"NZ, unfused, {models.EAGER}"
PLANTED_OPS = {op for op, _ in FAULTS.values()}


def checked(planted=(), **options):
    opener = partial(open_stand_in, tuple(planted), None)
    return check.check(opener, SOC, GOLDEN, lambda *_: None, small=True, **options)


@pytest.mark.slow
def test_a_device_that_does_as_assumed_has_no_findings():
    """Every assumption and sum, of the rest each ninth probe; all of it: see docs/device.md."""
    taken = iter(range(10_000))
    sections = ("ops", "assumptions", "vectors", "limits", "times", "cards")
    report = checked(
        sections=sections,
        only=lambda p: p.section in ("ops", "assumptions", "cards") or next(taken) % 9 == 0,
    )
    assert report["findings"] == []
    assert {each["verdict"] for each in report["assumptions"]} == {"yes"}
    assert len(report["assumptions"]) == len(NUMBERED)
    assert set(report["counts"]) == set(sections)
    assert all(each["ratio"] > 0 for each in report["times"])
    text = json.dumps(report) + device.render(report)
    for name in (str(ROOT), socket.gethostname(), getpass.getuser(), sys.prefix):
        assert len(name) < 5 or name not in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*bfloat16 model with an int8:kvc8.ir.errors.ModelWarning")
def test_each_planted_fault_is_found_by_its_name_and_nothing_else_is_blamed():
    """Of the limits those of 80 heads, and of the rest each sixth probe; docs/device.md has all."""
    taken = iter(range(10_000))

    def asked(probe):
        if probe.section == "model":
            return probe.name == NZ
        mine = set(probe.ops) <= PLANTED_OPS
        always = probe.section in ("ops", "assumptions") or "num_heads 80" in probe.name
        return mine and (always or next(taken) % 6 == 0)

    report = checked(
        FAULTS,
        sections=("ops", "assumptions", "vectors", "limits", "model"),
        only=asked,
        limit=40,  # the hang waits so long; machines are busy
    )
    found = [(each["kind"], each["name"]) for each in report["findings"]]
    heads = 1 + next(
        i
        for i, row in enumerate(limits(SOC)["npu_fused_infer_attention_score"])
        if row.fact == "heads and kv heads"
    )
    assert found == [
        (MISSING, "npu_moe_gating_top_k"),
        (LOST, "A6"),  # crashes
        (LOST, "A26"),  # hangs
        (ASSUMPTION, "A2"),
        (ASSUMPTION, "A4"),
        (ASSUMPTION, "A8"),
        (ASSUMPTION, "A17"),
        (LAX, f"npu_fused_infer_attention_score row {heads}"),
    ]
    lax = report["findings"][-1]
    assert report["counts"]["model"] == {"off by more": 1}  # by NZ read as ND, which A17 names
    assert lax["change"]["value"] == "80 and 8"
    assert "EZ1001" in lax["what"]


def test_the_document_has_the_assumptions_by_their_numbers():
    document = (ROOT / "docs" / "device.md").read_text()
    assert [line for line in document.splitlines() if line.startswith("| A")] == table()


def test_a_legal_call_has_tensors_of_its_types_and_facts():
    each = NUMBERED[1]
    made = tensors(each.call)
    assert made["input"].shape == (3, 4096)
    assert made["input"].dtype is torch.float16
    assert facts_of(each.call)["scales dtype"] == "f32"
    assert len(emulated(each.call, made)) == 1


def test_how_far_apart():
    codes = torch.tensor([1, 2, 127], dtype=torch.int8)
    half = torch.tensor([1.0, 2.0], dtype=torch.float16)
    assert apart([codes], [codes]).outcome == EQUAL
    assert apart([codes - 1], [codes]).outcome == BY_ONE
    assert apart([codes - 2], [codes]).outcome == BY_MORE
    assert apart([half * (1 + 2**-10)], [half]).outcome == BY_ONE
    assert apart([half * 1.1], [half]).outcome == BY_MORE
    assert apart([half.float()], [half]).outcome == BY_MORE
    assert apart([half], [half, half]).outcome == BY_MORE


def test_a_refusal_has_its_code_and_no_place():
    error = RuntimeError("call failed in /usr/local/x.so by me@host, EZ9999: inner error\nmore")
    assert refusal(error) == {
        "outcome": "refused",
        "code": "EZ9999",
        "said": "call failed in by EZ9999: inner error",
    }


def finding(kind, op, row, value):
    fact = limits(SOC)[op][row].fact
    change = {"row": row, "fact": fact, "value": value}
    return {"kind": kind, "op": op, "name": f"{op} row {row + 1}", "what": "", "change": change}


def place(op, fact):
    return next(i for i, row in enumerate(limits(SOC)[op]) if row.fact == fact)


def test_applying_a_report_changes_five_rows_and_two_assumptions():
    attention = "npu_fused_infer_attention_score"
    heads = place(attention, "heads and kv heads")
    rows = [
        finding(STRICT, attention, heads, "16 and 2"),
        finding(LAX, attention, heads, "80 and 8"),
        finding(STRICT, "npu_quantize", place("npu_quantize", "input dtype"), "f32"),
        finding(STRICT, "npu_quant_matmul", place("npu_quant_matmul", "inner size"), 70000),
        finding(LAX, "npu_quant_matmul", place("npu_quant_matmul", "outer size"), 65535),
        finding(STRICT, "npu_add_rms_norm_quant",
                place("npu_add_rms_norm_quant", "scales1 shape"), "[1]"),
    ]  # fmt: skip
    what = "npu_rms_norm_quant divides by its scale: no, off by more: 4 at most, 90.00% of values"
    rows.append(
        {"kind": ASSUMPTION, "op": "npu_rms_norm_quant", "name": "A17", "what": what, "change": {}}
    )
    verdicts = {2: ("yes", "equal"), 17: ("no", "off by more: 4 at most"), 3: ("unknown", "hung")}
    report = {
        "soc": SOC,
        "facts": {"SoC": "Ascend910B2"},
        "findings": rows,
        "assumptions": [
            {"number": n, "verdict": verdict, "figure": figure}
            for n, (verdict, figure) in verdicts.items()
        ],
    }
    lines = list(apply.changes(report))
    new = [line[1:].strip().rstrip(",") for line in lines if line.startswith("+")]
    changed = [json.loads(line) for line in new if line.startswith("{")]
    assert [row["fact"] for row in changed] == [
        *("input dtype", "inner size", "outer size"),
        *("heads and kv heads", "scales1 shape"),
    ]
    assert changed[0]["one_of"] == ["f16", "bf16", "f32"]
    assert (changed[1]["max"], changed[2]["max"]) == (70000, 65534)
    assert "16 and 2" in changed[3]["one_of"]
    assert "80 and 8" not in changed[3]["one_of"]
    assert changed[4]["source"].endswith("; a device takes [1]")
    assert [line for line in new if line.startswith("| A")] == [
        "| A2 | `npu_quantize` | saturates at -128 and 127 | yes on Ascend910B2 |",
        "| A17 | `npu_rms_norm_quant` | divides by its scale | "
        "no on Ascend910B2, off by more: 4 at most |",
    ]
    assert lines[-1] == f"backends/npu/emulation/norm.py: A17: {what}"


def test_a_report_without_findings_changes_nothing():
    report = {"soc": SOC, "facts": {}, "findings": [], "assumptions": []}
    assert list(apply.changes(report)) == []
    text = (ROOT / apply.LEGALITY).read_text()
    assert not list(difflib.unified_diff([text], [apply.with_rows(text, report)]))


def test_a_row_that_takes_more_or_less():
    row = {"fact": "head_dim", "multiple": 32, "max": 512}
    assert apply.changed(row, STRICT, 80) == {"fact": "head_dim", "multiple": 16, "max": 512}
    assert apply.changed(row, STRICT, 576) == {"fact": "head_dim", "multiple": 32, "max": 576}
    assert apply.changed(row, LAX, 512) == {"fact": "head_dim", "multiple": 32, "max": 480}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-o", "report"], "torch_npu: is not installed; install kvc8[npu] on a machine with CANN"),
        (["--apply", "{}/a"], "{}/a: is no report of format 1; make it with kvc8-device-check of "
         "this version"),
    ],
)  # fmt: skip
def test_the_commands_errors(given, said, tmp_path, capsys):
    (tmp_path / "a").write_text("{}")
    arguments = [each.format(tmp_path) for each in given]
    assert command.entry(device_check.parser(), device_check.work, arguments) == 1
    assert capsys.readouterr().err == f"error: {said.format(tmp_path)}\n"


def test_an_op_that_writes_caches_explains_what_attention_makes_of_them():
    attention, write = "npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache"
    differ = [["decode", "node", op, 3, 9, 7.0] for op in (attention, "npu_swiglu", "flatten")]
    model = runner.Probe("m", "model", "model", None, (attention, write, "npu_swiglu"))
    written = runner.Answer(
        runner.Probe("A8", "assumptions", "assumption", 8, (write,)),
        {"outcome": "off by more", "figure": "", "holds": False},
    )
    told = runner.Answer(model, {"outcome": "off by more", "differ": differ})
    found = findings.findings([written, told], {}, limits(SOC))
    assert [each.name for each in found] == ["A8", "m: npu_swiglu"]
    alone = findings.findings([told], {}, limits(SOC))
    assert [each.op for each in alone] == [attention, "npu_swiglu", "flatten"]


@pytest.mark.slow
def test_the_tiny_model_runs_by_steps_and_by_graphs_and_a_fault_in_it_is_named(tmp_path):
    form = models.compile_form(tmp_path, SOC, "unfused")
    ways = models.ways("unfused")
    assert ways == (models.EAGER, models.NPU_GRAPH, models.GE_GRAPH)
    for way in ways:
        told = models.compared(open_stand_in(), form, way)
        assert (told["outcome"], told["differ"], told["same tokens"]) == ("equal", [], True)
    told = models.compared(open_stand_in(("10 bits",)), form, models.EAGER)
    assert {phase for phase, *_ in told["differ"]} == {"prefill", "chunk", "decode"}
    assert {op for _, _, op, *_ in told["differ"]} == {"npu_quant_matmul"}


def test_a_layer_is_timed_whole_and_of_a_rank_of_eight_by_calls_that_are_legal():
    calls = timings.timed_calls(small=False)
    names = {each.name for each in calls}
    assert len(names) == len(calls)
    for of in ("", ", a rank of 8"):
        sizes = product((1, 16, 64), ("1,024", "8,192", "32,768"))
        assert names >= {f"attention, {b} of {c} tokens{of}" for b, c in sizes}
        assert f"attention, a prompt of 4,096 tokens{of}" in names
    for each in calls:
        op = each.call.op
        assert not list(breaks(op, limits(SOC)[op], facts_of(each.call))), each.name


def test_the_bound_of_a_timed_call_is_the_longer_of_bytes_and_operations():
    on = Device()
    bound = {each.name: each.bound for each in timings.timed_calls(small=False)}
    pages = 2 * 64 * 32768 * 8 * 128  # keys and values, a byte each
    assert bound["attention, 64 of 32,768 tokens"] == pytest.approx(pages / on.bandwidth, rel=0.01)
    half = 2 * 2 * 4096 * 4097 / 2 * 64 * 128
    assert bound["attention, a prompt of 4,096 tokens"] == pytest.approx(half / on.half)
    # float16: a row of ten heads, cosines and sines, eight queries back; int8: two rows of caches
    rows = 4096 * 128 * (2 * (10 + 2 + 8) + 2)
    written = bound["npu_rope_quant_kvcache, 4,096 tokens, a rank of 8"]
    assert written == pytest.approx(rows / on.bandwidth, rel=0.001)


@pytest.mark.parametrize("number", [15, 16, 18, 25, 30, 31])
def test_another_order_of_sums_is_right_and_another_place_of_rounding_is_not(number):
    """The op once more in double precision, and once with a rounding where there is none."""
    each = NUMBERED[number]
    values = each.values()
    want, allowed = emulated(each.call, values), within(each.op, values)
    exact, other = READINGS[each.op](values)
    codes = [x for x in want if x.dtype is exact.dtype and x.shape == exact.shape][:1]
    assert each.holds(apart([exact], codes, allowed), allowed)
    assert not each.holds(apart([other], codes, allowed), allowed)


def norm_of(x, gamma, dtype, inside):
    """The norm with everything in `inside`, and rounded to its dtype before gamma or only after."""
    wide = x.to(inside)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    once, twice = normed * gamma.to(inside), normed.to(dtype) * gamma
    return once.to(dtype), twice.to(dtype)


def codes_of(values, normed):
    steps = normed.float() / values["scales1"].float() + values["zero_points1"].float()
    return steps.round().clamp(-128, 127).to(torch.int8)


def added_norm_codes(values):
    once, twice = norm_of(
        values["x1"] + values["x2"], values["gamma"], torch.bfloat16, torch.double
    )
    return codes_of(values, twice), codes_of(values, once)


def swiglu(values):
    first, second = values["input"].double().chunk(2, -1)
    once = (first * first.sigmoid() * second).half()
    return once, (first * first.sigmoid()).half() * second.half()


def geglu(values):
    gate, up = values["input"].double().chunk(2, -1)
    dtype, wide = values["input"].dtype, torch.nn.functional.gelu(gate, approximate="tanh")
    once, twice = (wide * up).to(dtype), (wide.to(dtype).double() * up).to(dtype)
    return (twice, once) if dtype is torch.float16 else (once, twice)


READINGS = {
    "npu_rms_norm": lambda v: norm_of(v["input"], v["gamma"], torch.float16, torch.double),
    "npu_add_rms_norm": lambda v: norm_of(
        v["x1"] + v["x2"], v["gamma"], torch.float16, torch.double
    ),
    "npu_add_rms_norm_quant": added_norm_codes,
    "npu_swiglu": swiglu,
    "npu_geglu": geglu,
}


@pytest.mark.parametrize("number", [10, 11])
def test_attention_by_int8_parts_is_right_and_offsets_of_the_other_sign_are_not(number):
    """The query in two int8 parts, as the kernel has it."""
    each = NUMBERED[number]
    values = each.values()
    want, allowed = emulated(each.call, values), within(each.op, values)
    largest = values["query"].float().abs().amax(-1, keepdim=True)
    first = (values["query"].float() / largest * 127).round()
    rest = ((values["query"].float() / largest * 127 - first) * 254).round()
    split = {**values, "query": (first / 127 + rest / 127 / 254) * largest}
    wide = {k: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for k, x in split.items()}  # fmt: skip
    parts = [x.to(want[0].dtype) for x in emulated(each.call, wide)[:1]]
    assert each.holds(apart(parts, want[:1], allowed), allowed)
    if number == 10:
        signs = {n: -x if n.endswith("offset") else x for n, x in values.items()}
        other = emulated(each.call, signs)
        assert not each.holds(apart(other, want, allowed), allowed)


def test_how_many_values_may_differ_by_chance():
    assert Within(share=0.0).at_most(10**6) == 9
    assert 60 < Within(share=0.05).at_most(1000) < 120


def test_a_sum_over_cards_that_is_wrong_is_found():
    each = collectives.TimedSum(2, 1, 64, torch.float16)
    probe = runner.Probe(each.name, "cards", "sum", each, cards=2)
    for outcome, count in (("equal", 0), ("off by more", 1), ("refused", 1)):
        found = findings.findings([runner.Answer(probe, {"outcome": outcome})], {}, limits(SOC))
        assert [(f.kind, f.name) for f in found] == [
            (DIFFERS, "all-reduce, 1 token in f16, 2 cards")
        ][:count]
    assert [s.name for s in collectives.timed_sums(1, small=False)] == []
    assert {s.cards for s in collectives.timed_sums(8, small=False)} == {2, 8}
    assert each.sent == each.bytes
