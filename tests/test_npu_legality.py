"""What a device does not take is refused by a row of the table: reason, source, what to do.

golden/npu_legality/legal.json has one legal call of each op that a limit is tried on, and
refused.json changes of those calls (null leaves an argument out) with the sentence they get.
"""

import json
import re
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from kvc8.backends.npu import legality
from kvc8.backends.npu.explain import explain
from kvc8.backends.npu.facts import facts
from kvc8.ir import npu
from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program
from kvc8.ir.text import parse

SOC = "ascend910b"
GOLDEN = Path(__file__).parent / "golden" / "npu_legality"
LEGAL = json.loads((GOLDEN / "legal.json").read_text())
REFUSED = json.loads((GOLDEN / "refused.json").read_text())
TABLE = json.loads(files("kvc8.backends.npu").joinpath("legality.json").read_text())[SOC]
TYPE = re.compile(r"(f32|f16|bf16|i64|i32|i8|b8|ints)\[.*\]")
# Of the facts that every argument gives; see facts.py.
ENDINGS = ("", " dtype", " rank", " shape", " last dim")


def overload(op: str) -> torch._ops.OpOverload:
    found: torch._ops.OpOverload = getattr(
        npu, op.replace("_npu_", "atb_", 1) if op.startswith("_") else op
    )
    return found


def call(name: str, **changes: Any) -> Program:
    """A program that makes the legal call of that name, with changes."""
    op = overload(LEGAL[name]["op"])
    arguments = {**LEGAL[name]["arguments"], **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    types = {k: v for k, v in arguments.items() if isinstance(v, str) and TYPE.fullmatch(v)}
    head = ", ".join(f"{k}: {v}" for k, v in types.items())
    program = parse(f"def lowered({head}):\n    return [{next(iter(types))}]")
    nodes = dict(zip(types, program.inputs(), strict=True))
    lists = {a.name for a in op._schema.arguments if "List[Tensor]" in str(a.type)}
    given = {k: [nodes[k]] if k in lists else nodes.get(k, v) for k, v in arguments.items()}
    order = [a.name for a in op._schema.arguments if not a.kwarg_only]
    positional = [given.pop(k) for k in takewhile(given.__contains__, order)]
    output = next(iter(reversed(program.graph.nodes)))
    program.call(output, op, *positional, kwargs=given, name="call")
    return program


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_call_is_taken(name: str) -> None:
    legality.check(call(name), SOC, 128)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case['call']} {case['changes']}")
def test_a_call_that_breaks_a_row_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(TargetError) as refused:
        legality.check(call(case["call"], **case["changes"]), SOC, case["block_size"])
    assert str(refused.value) == case["says"]


def test_a_limit_that_another_source_contradicts_may_be_left_and_no_other() -> None:
    for case in REFUSED:
        made, rows = call(case["call"], **case["changes"]), TABLE[LEGAL[case["call"]]["op"]]
        contradicted = [row for row in rows if row.get("contradicted_by", "!") in case["says"]]
        if contradicted:
            assert [row["fact"] for row in contradicted] == ["heads and kv heads"]
            legality.check(made, SOC, case["block_size"], beyond_documents=True)
            continue
        with pytest.raises(TargetError) as refused:
            legality.check(made, SOC, case["block_size"], beyond_documents=True)
        assert str(refused.value) == case["says"]


def test_every_op_that_programs_may_call_has_rows_and_every_row_a_source_and_a_cure() -> None:
    assert set(TABLE) == {schema.partition("(")[0].split("::")[1] for schema in npu.SCHEMAS}
    assert all(row["source"] and row["cure"] for rows in TABLE.values() for row in rows)


def test_every_row_speaks_of_facts_that_calls_have() -> None:
    """A row of a fact that no call has would never refuse anything."""
    calls = [call(name).calls(overload(made["op"]))[0] for name, made in LEGAL.items()]
    derived = {fact for node in calls for fact in facts(node, block_size=128)}
    for op, rows in TABLE.items():
        names = [argument.name for argument in overload(op)._schema.arguments]
        known = {f"{name}{ending}" for name in names for ending in ENDINGS} | derived
        for row in rows:
            others = [row[key] for key in ("same_as", "multiple_of") if key in row]
            assert {row["fact"], *others, *row.get("when", {})} <= known, (op, row)


def test_an_unknown_soc() -> None:
    with pytest.raises(TargetError) as refused:
        legality.check(call("decode"), "ascend310p", 128)
    assert str(refused.value) == (
        "--soc: there are no limits for ascend310p; choose one of ascend910b"
    )


def test_an_alternative_is_judged_by_its_own_rows() -> None:
    wide = {"query": "f16[T, 1, 512]", "key": "i8[N, S, 256]", "value": "i8[N, S, 256]"}
    scales = {name: "f16[256]" for name in LEGAL["decode"]["arguments"] if "antiquant" in name}
    (choice,) = explain(call("decode", **wide, **scales), SOC, block_size=256)
    source = "ascend-transformer-boost paged_attention_operation.cpp:593"
    page = f"it takes block size x head_dim up to 16384, and this is 32768 ({source})"
    fia = "npu_fused_infer_attention_score"
    assert list(choice.lines()) == [
        f"attention over pages: 1 {fia}: reads int8 pages and dequantizes inside, one "
        "query a sequence, with offsets or without",
        f"    not npu_incre_flash_attention: {fia} calls the same kernel, and is what the vendor's "
        "runtimes use",
        f"    not _npu_paged_attention_quant: {page}",
        f"    not _npu_paged_attention: {page}",
    ]
