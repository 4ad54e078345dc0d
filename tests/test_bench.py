"""The benchmark measures what it says it does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from support.onnx_models import BOUND, captured, compiled
from support.ties import on_one_of

from kvc8.ir.capture.parameters import constant_expression
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.ir.expression import Expression
from kvc8.passes import pipeline
from kvc8.tools import bench
from kvc8.tools.benchmarks import plain as bench_plain
from kvc8.tools.benchmarks import rows, serving
from kvc8.tools.benchmarks.decode import TOKEN, step_inputs
from kvc8.tools.benchmarks.stateful import Stateful

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3"


def test_turns_are_taken_in_order_and_the_first_does_not_count():
    seen, now = [], iter(range(100))
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    taken = bench.interleave(calls, 2, clock=lambda: float(next(now)))
    assert seen == ["a", "b"] * 3
    assert taken == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_a_ratio_is_of_turns_taken_together():
    assert bench.ratio([1.0, 10.0, 2.0], [3.0, 20.0, 6.0]) == 3.0


def test_what_is_timed_is_called_and_counted():
    timed = serving.Timed(divmod)
    assert [timed(7, 2), timed(9, 4)] == [(3, 1), (2, 1)]
    assert timed.calls == 2
    assert timed.seconds > 0
    assert timed.__name__ == "divmod"


def test_openvino_is_asked_for_by_a_model_that_is_there(tmp_path):
    here = importlib.util.find_spec("openvino")
    with pytest.raises(TargetError) as caught:
        Stateful(tmp_path, threads=1)
    assert str(caught.value) == (
        f"{tmp_path.name}: holds no openvino_model.xml; export one by optimum-cli export openvino "
        "--task text-generation-with-past"
        if here
        else "openvino: is not installed; pip install openvino"
    )


def test_vllm_is_measured_in_this_process_or_not_at_all(monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with pytest.raises(TargetError) as caught:
        bench.work(bench.parser().parse_args(["serve", "artifact"]))
    assert str(caught.value) == (
        "VLLM_ENABLE_V1_MULTIPROCESSING: is not 0, so the steps of vLLM would be another "
        "process's; set it to 0"
    )


@pytest.mark.slow
def test_the_plain_graph_computes_the_same_model(tmp_path):
    """So that it is a fair yardstick: its weights are float, as the program's here."""
    directory, scales = GOLDEN / "orig", open_checkpoint(GOLDEN / "quant")
    program = captured(directory)
    for cache, scale in zip(program.caches(), sum(scales.kv.values(), ()), strict=True):
        heads, dim = (int(d) for d in cache.meta["type"].shape[2:])
        values = constant_expression(scales.read(scale.scale).float().reshape(heads, dim))
        cache.meta["expression"] = Expression("cache", (values, None, "post-rope"))
    pipeline.run(program, pipeline.AS_IS)
    session = compiled(program, directory, tmp_path / "out", "gqa")
    plain = bench_plain.Plain(open_checkpoint(directory), scales, threads=1)

    def agree(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        codes = [
            torch.randint(-128, 128, (1, 2, 40, 32), generator=random, dtype=torch.int8)
            for _ in session.caches
        ]
        given = {port.name: x for port, x in zip(session.caches, codes, strict=True)}
        want = session.run({**step_inputs(40), **given})
        got = [torch.from_numpy(x.numpy()) for x in plain.step(TOKEN, codes)()]
        assert (want[0] - got[0][0]).abs().max() <= BOUND * want[0].abs().max()
        assert all(torch.equal(a, b) for a, b in zip(want[1:], codes, strict=True))

    on_one_of((1, 2, 3), agree)


def test_a_table_has_a_line_a_row_and_80_columns():
    second = (12.25, 13.04)
    stages = rows.Stages("llama405b", *[second] * 5, all=second, peak_mb=1536)
    timing = rows.Timing("a step of vLLM", "chunk's program for all", 10260.25, 1.15, 2, 15)
    cost = rows.CommandCost("quantize", "msmodelslim, m3, float32", 100.5, 1630, 1.786, 1, 3)
    loss = rows.CacheLoss("K with offsets", "kv", -0.00121, 0.00051, 0.00402, 0.98766)
    lines = [rows.STAGES_HEAD, *map(str, (stages, timing, cost, loss))]
    assert max(map(len, lines)) <= 80
    assert lines == [
        "user/wall s      imports   headers   capture    passes     write       all    MB",
        "llama405b      12.2/13.0 12.2/13.0 12.2/13.0 12.2/13.0 12.2/13.0 12.2/13.0  1536",
        "  a step of vLLM  chunk's program for all     10260.25 ms     1.15x",
        "msmodelslim, m3, float32     100.5 s of user CPU    1630 MB    1.786x",
        "K with offsets    kv  perplexity -0.121%  KL 0.00051, 99 % 0.0040  top-1 98.77%",
    ]


@pytest.mark.slow
def test_the_stages_of_a_compile_are_parts_of_the_whole(capsys):
    given = ["compile", str(GOLDEN / "quant"), "--turns", "1", "--threads", "1", "--json"]
    assert bench.work(bench.parser().parse_args(given)) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["model"] == "quant"
    assert 0 < sum(row[stage][0] for stage in rows.STAGES) < row["all"][0] + 0.05  # rounded
    assert 100 < row["peak_mb"] < 2000
