"""What kvc8-compile --tp writes: what a rank maps of it, what it launches, and what reads it."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import fused_models
from support.sparse import LLAMA_70B, write_sparse

from kvc8.backends.npu import legality
from kvc8.backends.npu.artifact import disk_use
from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.npu.launches import launches
from kvc8.backends.runtime.model import load
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.program import Program, expression_of, tensor_type
from kvc8.passes.options import Options
from kvc8.passes.shard import shard
from kvc8.tools.driver.compiling import compile_model
from kvc8.tools.driver.request import Target
from kvc8.tools.evaluator.forms import Setup, open_form

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
LAYERS = 4  # of 80, which takes a twentieth of the time


def compiled(model: Path, out: Path, ranks: int, dtype: str | None = None) -> Path:
    compile_model(open_checkpoint(model), out, Target("npu", dtype=dtype), Options(ranks=ranks))
    return out


def sizes(program: Program) -> Counter[bool]:
    """The bytes of a program's parameters (False) and, of each slot, of its caches (True)."""
    found = Counter[bool]()
    for node in program.parameters():
        type_ = tensor_type(node)
        found[False] += type_.dtype.itemsize * math.prod(int(size) for size in type_.shape)
    for node in program.caches():
        found[True] += math.prod(int(size) for size in tensor_type(node).shape[2:])
    return found


def test_a_rank_of_the_shape_of_70b_holds_an_eighth(tmp_path):
    config = LLAMA_70B | {"num_hidden_layers": LAYERS}
    model = write_sparse(tmp_path / "model", config)
    with pytest.warns(match="every kv_cache_scale is zero"):
        alone = compiled(model, tmp_path / "alone", 1)
    with pytest.warns(match="every kv_cache_scale is zero"):
        out = compiled(model, tmp_path / "out", 8)
    whole = read(alone).of_rank(0)["decode"]
    assert disk_use(out).extra * 80 / LAYERS < 10e6
    for rank in range(8):
        mine = read(out).of_rank(rank)["decode"]
        assert not any(expression_of(node).differs for node in mine.parameters())
        assert sizes(mine)[True] == sizes(whole)[True] / 8
        assert sizes(mine)[False] == pytest.approx(sizes(whole)[False] / 8, rel=0.03)


@pytest.mark.parametrize(
    ("sums", "dtype", "scaling"),
    [
        ("half", torch.float16, {}),
        ("int32", torch.float16, {"npu_dequant_bias": 2}),
        ("int32", torch.bfloat16, {"add": 2, "to": 4, "mul": 2}),
    ],
)
def test_a_layer_launches_what_it_did_and_two_sums(tiny_model, sums, dtype, scaling):
    """Int32 sums are scaled after they are added: by a launch for each, or in float32 by four."""
    model = tiny_model("llama", tied=True, num_hidden_layers=2, head_dim=32)
    program = fused_models.quantized(model, dtype, w8a8=True, zeros=True)
    alone = fused_models.lowered(program, "on")
    shard(program, ranks=2, sums=sums)
    for phase, divided in fused_models.lowered(program, "on").items():
        legality.check(divided, "ascend910b", 128)
        more = launches(divided)[1] - launches(alone[phase])[1]
        assert more == Counter(all_reduce=2, **scaling)
        assert not launches(alone[phase])[1] - launches(divided)[1]


def test_all_ranks_are_evaluated_side_by_side(tmp_path):
    """Which is what processes compute: tests/test_ranks.py."""
    setup = Setup(torch.float32, Options(), float_cache=False)
    tokens, out = list(range(40, 64)), compiled(GOLDEN, tmp_path / "out", 2)
    opened = open_form(out, setup, len(tokens))
    artifact = read(out)
    model = load(artifact.side_by_side(), artifact.make, blocks=1, block_size=artifact.block_size)
    assert opened.kind == "NPU, emulated"
    assert torch.equal(opened.logits(tokens), model.prefill([tokens], [[0]], every=True))
