"""The cost report counts what a step moves: by hand on a small program, and of Llama-3.1-70B."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.sparse import LLAMA_70B, write_sparse

from kvc8.backends.npu.cost import OpCost, by_op, total
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.backends.workload import Device, Workload
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.program import Program
from kvc8.ir.text import parse
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.reporter import costs

PROGRAM = """
def lowered(
    input_ids: i64[T],
    slots: i32[T],
    table: i32[T, M],
    lens: ints[T],
    embed: f16[1000, 64] = stored("e"),
    k_cache_0: i8[N, S, 2, 32] = cache(),
    v_cache_0: i8[N, S, 2, 32] = cache(),
    scale: f32[64] = stored("s"),
    weight: i8[64, 32] = stored("w"),
    packed: i64[32] = stored("d"),
    half: f16[64] = stored("h"),
):
    embedding: f16[T, 64] = aten.embedding(embed, input_ids)
    codes: i8[T, 64] = npu.npu_quantize(embedding, scale, None, 1, -1, True)
    rows: i8[T, 2, 32] = aten.reshape(codes, [-1, 2, 32])
    nothing: () = npu.npu_scatter_pa_kv_cache(rows, rows, k_cache_0, v_cache_0, slots, cache_mode='Norm')
    q: f16[T, 1, 64] = aten.reshape(embedding, [-1, 1, 64])
    k: i8[N, S, 64] = aten.flatten.using_ints(k_cache_0, 2, 3)
    v: i8[N, S, 64] = aten.flatten.using_ints(v_cache_0, 2, 3)
    both: (f16[T, 1, 64], f32[0]) = npu.npu_fused_infer_attention_score(q, k, v, actual_seq_lengths_kv=lens, key_antiquant_scale=half, value_antiquant_scale=half, block_table=table, num_heads=2, num_key_value_heads=2, input_layout='BSH', block_size=128)
    out: f16[T, 1, 64] = both[0]
    logits: f16[T, 32] = npu.npu_quant_matmul(codes, weight, packed, output_dtype=5)
    return [logits, out, k_cache_0, v_cache_0]
"""  # noqa: E501  a program is printed one line a node


def test_a_step_by_hand() -> None:
    batch, context = 3, 300
    blocks = 3  # of 128 for 300 tokens
    each = by_op(parse(PROGRAM), "decode", Workload(batch, context), Device())
    assert {op: cost.launches for op, cost in each.items()} == dict.fromkeys(each, 1)
    row = batch * 64  # values of a row of each token
    assert each["embedding"].weights == 2 * row
    assert (each["embedding"].read, each["embedding"].written) == (8 * batch, 2 * row)
    assert (each["npu_quantize"].weights, each["npu_quantize"].read) == (64 * 4, 2 * row)
    assert each["npu_quantize"].written == row
    assert each["npu_scatter_pa_kv_cache"].cache_written == 2 * row
    assert each["npu_scatter_pa_kv_cache"].cache_read == 0
    attention = each["npu_fused_infer_attention_score"]
    assert attention.cache_read == 2 * batch * context * 64
    assert attention.read == 2 * row + 4 * batch * blocks
    assert attention.written == 2 * row
    assert attention.half_ops == 4 * batch * context * 64
    matmul = each["npu_quant_matmul"]
    assert (matmul.weights, matmul.read) == (64 * 32 + 32 * 8, row)
    assert (matmul.written, matmul.int8_ops) == (2 * batch * 32, 2 * batch * 64 * 32)


COLLECTIVES = """
def lowered(x: i32[1, T, 64], y: f16[1, R, 128]):
    all_reduce: i32[1, T, 64] = _c10d_functional.all_reduce(x, 'sum', 'tp')
    wait_tensor: i32[1, T, 64] = _c10d_functional.wait_tensor(all_reduce)
    gather: f16[4, R, 128] = _c10d_functional.all_gather_into_tensor(y, 4, 'tp')
    wait_tensor_1: f16[4, R, 128] = _c10d_functional.wait_tensor(gather)
    return [wait_tensor, wait_tensor_1]
"""


def test_collectives_send_over_all_links_of_a_card() -> None:
    batch, link = 3, 1e6
    work, slow = Workload(batch, cards=4), Device(link=link)
    each = by_op(parse(COLLECTIVES), "decode", work, slow)
    summed, gathered = each["all_reduce"], each["all_gather_into_tensor"]
    assert (summed.launches, gathered.launches) == (1, 1)
    assert summed.sent == 2 * 3 * (4 * batch * 64) // 4  # of int32 sums
    assert gathered.sent == 3 * (2 * batch * 128)  # its own part, to each of three
    assert gathered.written == 4 * (2 * batch * 128)
    assert summed.seconds == summed.sent / (3 * link)
    assert by_op(parse(COLLECTIVES), "decode", Workload(batch), slow)["all_reduce"].sent == 0


def test_a_launch_takes_the_longer_of_moving_and_computing() -> None:
    slow = Device(bandwidth=100.0, int8=1e3, half=10.0)
    assert OpCost(weights=200).at(slow).seconds == 2.0
    assert OpCost(weights=200, half_ops=50).at(slow).seconds == 5.0
    assert OpCost(read=100, written=100, int8_ops=10**4).at(slow).seconds == 10.0


def compiled(directory: Path, config: dict[str, Any], *options: Options) -> list[Program]:
    """The decode step of a model without weights, by each of the options."""
    directory = write_sparse(directory, config)
    with pytest.warns(UserWarning, match="the shards hold no data"):
        captured = capture(open_checkpoint(directory), torch.float16)
    found = []
    for each in options:
        program = captured.copy()
        pipeline.run(program, pipeline.quantize_passes(each))
        found.append(pipeline.lower_for_npu(program, each)[0]["decode"])
    return found


@pytest.mark.slow
def test_a_token_of_llama_70b_moves_its_weights_its_cache_and_one_pass_of_activations(
    tmp_path: Path,
) -> None:
    """Within 3 % of what config.json alone says."""
    [llama_70b] = compiled(tmp_path / "model", LLAMA_70B, pipeline.DEFAULT)
    c, context = LLAMA_70B, 8192
    layers, hidden, inner = c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"]
    kv = c["num_key_value_heads"] * hidden // c["num_attention_heads"]
    int8 = 2 * hidden * hidden + 2 * hidden * kv + 2 * hidden * inner  # q, o, k, v, gate, up
    half = 2 * inner * hidden  # down_proj is float16 in this checkpoint
    weights = layers * (int8 + half) + 2 * c["vocab_size"] * hidden  # of the embedding one row
    cache = layers * 2 * kv * context
    # A value is written by one op and read by the next: float16 out of each linear, int8 into it.
    wide = 5 * hidden + 2 * kv + 3 * inner
    activations = layers * 2 * (2 + 1) * wide
    found = total(by_op(llama_70b, "decode", Workload(1, context), Device()))
    assert found.cache_read == cache
    assert found.cache_written == layers * 2 * kv
    assert found.bytes == pytest.approx(weights + cache + activations, rel=0.03)
    assert found.weights == pytest.approx(weights, rel=0.001)
    assert kv_layout(llama_70b).bytes_per_token == cache // context


@pytest.mark.slow
def test_a_card_of_eight_moves_an_eighth_and_sends_the_sums(
    tmp_path: Path,
) -> None:
    """Of two layers of Llama-3.1-70B."""
    cards, batch, layers = 8, 4, 2
    c = {**LLAMA_70B, "num_hidden_layers": layers}
    alone, decode = compiled(tmp_path / "model", c, pipeline.DEFAULT, Options(ranks=cards))
    one = {"decode": decode}
    found = costs.report(one, one, Workload(batch, cards=cards), Device())
    each = found.phases["decode"]
    whole = total(by_op(alone, "decode", Workload(batch), Device()))
    assert each.total["cache_read"] == whole.cache_read / cards
    assert each.total["weights"] == pytest.approx(whole.weights / cards, rel=0.03)
    # Sums after o, which is W8A8, in int32, and after down, which is float, in float16; each card's
    # part of the embeddings and of the logits in float16 goes to all others.
    sums = layers * (4 + 2) * batch * c["hidden_size"]
    parts = 2 * batch * (c["hidden_size"] + c["vocab_size"]) // cards
    sent = 2 * (cards - 1) / cards * sums + (cards - 1) * parts
    assert each.total["sent"] == sent
    # Small sums move faster over the links than through the memory: the bound is of the longer.
    links = each.total["sent"] / (cards - 1) / Device().link
    assert links <= each.link_seconds < 1.02 * links
    lines = list(costs.report_lines(found))
    assert lines[1].endswith("links MB")
    assert f"of it sent over the links: {sent / 1e6:,.1f} MB a step, at least" in "\n".join(lines)
    assert lines[-1].startswith("links at 56 GB/s from a card to each other one (")
