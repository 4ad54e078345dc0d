"""Processes that share one model: what they compute, and how they end when one is missing."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import ranks as sessions
from support.processes import started

from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.model import Model, load
from kvc8.backends.runtime.ranks import SPOKEN
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.passes.options import Options
from kvc8.tools import run
from kvc8.tools.driver.compiling import compile_model
from kvc8.tools.driver.ranks import joined
from kvc8.tools.driver.request import Target

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
CPU = torch.device("cpu")
ENDED = (
    "error: torchrun: another rank has ended, and none can go on alone; "
    "see what it said, start again\n"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The artifact of one model by ranks."""
    folder, checkpoint = tmp_path_factory.mktemp("tp"), open_checkpoint(GOLDEN)
    for count in (2, 8):
        target = Target("npu", block_size=sessions.BLOCK)
        compile_model(checkpoint, folder / str(count), target, Options(ranks=count))
    return {count: folder / str(count) for count in (2, 8)}


def steps(model: Model) -> torch.Tensor:
    """Logits of a prompt, a chunk of it and ten greedy tokens."""
    tokens, table = sessions.A, sessions.TABLES[0]
    logits = [model.prefill([tokens[:9]], [table]), model.chunk([Rows(tokens[9:], 9, table)])]
    for length in range(len(tokens) + 1, len(tokens) + 11):
        logits.append(model.decode([int(logits[-1].argmax())], [length], [table]))
    return torch.cat(logits)


@pytest.mark.parametrize("count", [2, 8])
def test_processes_give_the_same_logits_bit_for_bit(compiled, tmp_path, count):
    """Two give what one process with both ranks gives; eight may add floats in another order."""
    artifact = read(compiled[count])
    options = {"blocks": 6, "block_size": sessions.BLOCK}

    def rank_of(rank: int) -> int:
        with joined(CPU):
            model = load(artifact.of_rank(rank), artifact.make, **options)
            torch.save(steps(model), tmp_path / f"{rank}.pt")
        return 0

    start = time.monotonic()
    ended = started(count, rank_of, tmp_path)
    assert time.monotonic() - start < 60
    assert [status for status, *_ in ended] == [0] * count, ended[0][2]
    first, *others = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    assert all(torch.equal(other, first) for other in others)
    if count == 2:
        both = load(artifact.side_by_side(), artifact.make, **options)
        assert torch.equal(steps(both), first)


def generating(out: Path, *others: object):
    arguments = [out, "--prompt", "hello", "--max-new-tokens", 8, *others]
    return run.main([str(argument) for argument in arguments])


def test_the_first_rank_prints_and_the_others_are_silent(compiled, tmp_path):
    first, second = started(2, lambda rank: generating(compiled[2]), tmp_path)
    assert (first[0], *second) == (0, 0, "", "")
    assert first[1].endswith("\n")
    assert "256 bytes, 50% of float16's 512" in first[2]


def said(ended: list[tuple[int, str, str]]) -> str:
    return "".join(err for _, _, err in ended)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_ends_all_in_a_sentence(compiled, tmp_path, monkeypatch, lost):
    from kvc8.backends.runtime import generate

    choose, chosen = generate.choose, []

    def dies(*given: object) -> int:
        chosen.append(choose(*given))
        if len(chosen) == 3 and os.environ["RANK"] == str(lost):
            (tmp_path / "when").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        return chosen[-1]

    monkeypatch.setattr(generate, "choose", dies)
    ended = started(2, lambda rank: generating(compiled[2]), tmp_path)
    assert time.monotonic() - float((tmp_path / "when").read_text()) < 30
    assert said(ended) == ENDED
    assert ended[1 - lost][0] == 1


@pytest.mark.parametrize("spoken", [False, True])
def test_a_rank_that_cannot_join_says_so_unless_another_spoke(
    compiled, tmp_path, monkeypatch, spoken
):
    """As where one has refused and ended while this one still connects to it."""

    def refuse(*_: object, store: dist.Store, **__: object) -> None:
        if spoken:
            store.add(SPOKEN, 1)
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:144] no error")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    ended = started(1, lambda rank: generating(compiled[2]), tmp_path)
    assert ended == [(1, "", "" if spoken else ENDED)]


def test_another_number_of_ranks_is_one_sentence(compiled, tmp_path):
    ended = started(3, lambda rank: generating(compiled[2]), tmp_path)
    assert [status for status, *_ in ended] == [1, 1, 1]
    assert said(ended) == (
        f"error: {compiled[2]}: is compiled for 2 ranks and 3 run it; "
        "start torchrun --nproc-per-node 2 -m kvc8.tools.run\n"
    )


def test_a_rank_alone_says_how_to_start(compiled, capsys):
    assert generating(compiled[2]) == 1
    assert capsys.readouterr().err == (
        f"error: {compiled[2]}: is compiled for 2 ranks and 1 runs it; "
        "start torchrun --nproc-per-node 2 -m kvc8.tools.run\n"
    )


def test_ranks_with_different_artifacts_are_one_sentence(compiled, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(compiled[2], other)
    derived = other / "derived.safetensors"
    content = bytearray(derived.read_bytes())
    content[-1] ^= 1
    derived.write_bytes(content)
    ended = started(2, lambda rank: generating(other if rank else compiled[2]), tmp_path)
    assert said(ended) == (
        "error: derived.safetensors: rank 1 has another one than rank 0; "
        "give all ranks one artifact, or copies of it\n"
    )
