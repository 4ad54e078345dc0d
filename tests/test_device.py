"""What is there for a device, on a CPU: recorded decode steps, other engines, dumps of values."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_npu import FakeNpu
from torch.utils._python_dispatch import TorchDispatchMode

from kvc8.backends.npu.artifact import CompiledFor, write
from kvc8.backends.npu.artifact_reader import Artifact, read
from kvc8.backends.npu.dumps import ValueDump, again, read_dump
from kvc8.backends.npu.embed import load_steps
from kvc8.backends.npu.graphs import Recorder
from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.model import load
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import TargetError
from kvc8.passes import pipeline

pytestmark = pytest.mark.slow  # captures a model

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
BLOCK = 32
PROMPTS = [[5, 6, 7], [9, 8] * 20, [11]]
ATTENTION = torch.ops.npu.npu_fused_infer_attention_score.default


def compiled(directory: Path, out: Path) -> Artifact:
    checkpoint = open_checkpoint(directory)
    program = capture(checkpoint)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    write(out, checkpoint, lowered, CompiledFor("ascend910b", BLOCK))
    return read(out)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled(GOLDEN, tmp_path_factory.mktemp("artifact") / "out")


def generated(artifact: Artifact, npu: FakeNpu | None) -> list[list[int]]:
    model = load(artifact.programs, artifact.make, blocks=8, block_size=BLOCK)
    if npu:
        model.runner = Recorder(npu, blocks=8)
    found = generate(model, PROMPTS, most=30, stops=frozenset())
    return [sequence.generated for sequence in found.sequences]


def test_recorded_steps_give_the_tokens_of_eager_ones(artifact: Artifact) -> None:
    """30 tokens: lengths change at each step, and the second sequence goes on to a third block."""
    npu = FakeNpu()
    assert generated(artifact, npu) == generated(artifact, None)
    assert [tape.replays for tape in npu.tapes] == [29]


def test_recorded_steps_in_a_window(tiny_c8: Callable[..., Path], tmp_path: Path) -> None:
    """A window has a table, lengths and a mask of its own; lengths differ from call to call."""
    windowed = compiled(tiny_c8("mistral"), tmp_path / "out")
    assert any(
        name.startswith("window_") for name in map(str, windowed.programs["decode"].inputs())
    )
    npu = FakeNpu()
    assert generated(windowed, npu) == generated(windowed, None)
    # A prompt of one token is a step of decode where a window is a band.
    assert [tape.replays for tape in npu.tapes] == [1, 29]


def test_a_graph_a_number_of_sequences(artifact: Artifact) -> None:
    npu = FakeNpu()
    model = load(artifact.programs, artifact.make, blocks=8, block_size=BLOCK)
    model.runner = Recorder(npu, blocks=8)
    model.prefill([[5, 6, 7], [11]], [[0], [1]])
    for lengths in ([4, 2], [5, 3]):
        model.decode([1, 2], lengths, [[0], [1]])
    model.decode([1], [6], [[0]])
    assert [tape.replays for tape in npu.tapes] == [2, 1]


def test_an_engine_with_its_own_caches(artifact: Artifact) -> None:
    steps = load_steps(artifact.path, torch.device("cpu"))
    assert steps.decode.inputs["kv_lens"] == "ints[T]"
    caches = [
        torch.zeros(4, BLOCK, cache.heads, cache.head_dim, dtype=cache.dtype)
        for cache in steps.layout.caches
    ]
    prompt, made = PROMPTS[0], list[int]()
    every = {
        "input_ids": torch.tensor(prompt),
        "positions": torch.arange(3),
        "slot_mapping": torch.arange(3, dtype=torch.int32) + 2 * BLOCK,
        "logits_rows": torch.tensor([2]),
        "query_ends": [3],
    }
    logits = steps.prefill(every, caches)
    for length in range(4, 33):
        made.append(int(logits[0].argmax()))
        one = {
            "input_ids": torch.tensor(made[-1:]),
            "positions": torch.tensor([length - 1]),
            "slot_mapping": torch.tensor([2 * BLOCK + length - 1], dtype=torch.int32),
            "logits_rows": torch.tensor([0]),
            "block_table": torch.tensor([[2]], dtype=torch.int32),
            "kv_lens": [length],
        }
        logits = steps.decode(one, caches)
    assert made == generated(artifact, None)[0][: len(made)]
    with pytest.raises(TargetError) as refused:
        steps.decode({}, caches[:3])
    assert str(refused.value) == (
        "caches: 3 tensors for a program of 8; give K and V of each layer"
    )


class Faulty(TorchDispatchMode):
    """A device whose SwiGLU is off by one, and all that follows with it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out + 1 if func is torch.ops.npu.npu_swiglu.default else out


@pytest.mark.parametrize("device", [None, Faulty])
def test_a_dump_shows_the_op_at_fault_and_no_other(
    artifact: Artifact, device: type[Faulty] | None, tmp_path: Path
) -> None:
    model = load(artifact.programs, artifact.make, blocks=8, block_size=BLOCK)
    recording = ValueDump(model.programs)
    model.runner = recording
    with device() if device else nullcontext():
        generate(model, PROMPTS[:1], most=3, stops=frozenset())
    recording.write(tmp_path / "values")
    dump = read_dump(tmp_path / "values")
    for phase in ("prefill", "decode"):
        program = artifact.programs[phase]
        found = list(again(phase, program, dump, model.parameters[phase]))
        assert {each.op for each in found if each.differ} == ({"npu_swiglu"} if device else set())
        assert [each.node for each in found[-8:]] == [node.name for node in program.caches()]
        assert len(found) > 50


def test_the_dump_of_another_program(artifact: Artifact) -> None:
    with pytest.raises(TargetError) as refused:
        list(again("decode", artifact.programs["decode"], {}, {}))
    first = artifact.programs["decode"].inputs()[0].name
    assert str(refused.value) == (
        f"decode/in/{first}: is not in the dump; give the dump of this very program"
    )
