"""An artifact holds what was compiled, copies no weights, and is there whole or not at all."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import forked

from kvc8.backends.npu import emulation as _emulated  # noqa: F401
from kvc8.backends.npu.artifact import PHASES, CompiledFor, DiskUse, disk_use, write
from kvc8.backends.npu.artifact_reader import read
from kvc8.ir.checkpoint import new_directory
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.errors import IRError, KVC8Error, ModelError, TargetError
from kvc8.ir.program import Program
from kvc8.ir.text import parse, show

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


# A model of one layer without attention: what is embedded goes into the cache and out again.
TEXT = """
def lowered(
    input_ids: i64[T],
    slot_mapping: i32[T],
    logits_rows: i64[R],
    embed: f16[16, 4] = stored("embed"),
    k_quant_scale_0: f32[4] = round_up(cast(stored("scale"), f32), f16),
    head: f16[4, 16] = transpose(stored("embed"), 0, 1),
    k_cache_0: i8[N, S, 1, 4] = cache(),
    v_cache_0: i8[N, S, 1, 4] = cache(),
):
    rows: f16[T, 4] = aten.embedding(embed, input_ids)
    codes: i8[T, 4] = npu.npu_quantize(rows, k_quant_scale_0, None, 1, -1, True)
    shaped: i8[T, 1, 4] = aten.reshape(codes, [-1, 1, 4])
    write: () = npu.npu_scatter_pa_kv_cache(shaped, shaped, k_cache_0, v_cache_0, slot_mapping, cache_mode='Norm')
    wanted: f16[R, 4] = aten.index_select(rows, 0, logits_rows)
    logits: f16[R, 16] = aten.matmul(wanted, head)
    return [logits, k_cache_0, v_cache_0]
"""  # noqa: E501
TARGET = CompiledFor("ascend910b", 32, {"prefill_kv": "float"})


def programs(text: str = TEXT) -> dict[str, Program]:
    return {phase: parse(text) for phase in PHASES}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "toy"}')
    (directory / "tokenizer.json").write_text("{}")
    random = torch.Generator().manual_seed(0)
    shards = {
        "a.safetensors": {
            "embed": torch.randn(16, 4, generator=random).half(),
            "scale": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        },
        "b.safetensors": {"unused": torch.zeros(4)},
    }
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    index = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return open_checkpoint(directory)


@pytest.fixture
def out(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    write(tmp_path / "out", checkpoint, programs(), TARGET)
    return tmp_path / "out"


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ("model", "out"))


def test_what_is_written_is_read_back(out: Path, checkpoint: Checkpoint) -> None:
    found = read(out)
    assert (found.model, found.model_type, found.soc) == ("model", "toy", "ascend910b")
    assert (found.dtype, found.block_size, found.notes) == ("f16", 32, {"prefill_kv": "float"})
    assert (found.layout.bytes_per_token, found.layout.float16_bytes_per_token) == (8, 16)
    derived = TEXT.replace(
        'round_up(cast(stored("scale"), f32), f16)', 'derived("k_quant_scale_0")'
    )
    assert show(found.programs["prefill"]) == show(parse(derived))
    made = {n.name: found.make(n.meta["expression"]) for n in found.programs["decode"].parameters()}
    assert torch.equal(made["head"], checkpoint.read("embed").T)
    want = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert (made["k_quant_scale_0"] >= want).all()
    assert (made["k_quant_scale_0"] < want * 1.001).all()


def test_the_directory_holds_links_to_the_shards_in_use_and_little_else(
    out: Path, checkpoint: Checkpoint
) -> None:
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert names == [
        "chunk.py",
        "config.json",
        "decode.py",
        "derived.safetensors",
        "manifest.json",
        "prefill.py",
        "tokenizer.json",
        "weights/a.safetensors",
        "weights/model.safetensors.index.json",
    ]
    assert (out / "weights/a.safetensors").samefile(checkpoint.path / "a.safetensors")
    assert list(load_file(out / "derived.safetensors")) == ["k_quant_scale_0"]
    sizes = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    shard = sizes[out / "weights/a.safetensors"]
    assert disk_use(out) == DiskUse(weights=shard, extra=sum(sizes.values()) - shard)


def test_a_link_leads_to_the_file_and_not_to_a_link(tmp_path: Path, checkpoint: Checkpoint) -> None:
    shard = checkpoint.path / "a.safetensors"
    shard.rename(checkpoint.path / "real")
    shard.symlink_to("real")
    write(tmp_path / "out", open_checkpoint(checkpoint.path), programs(), TARGET)
    shutil.rmtree(checkpoint.path)
    assert not (tmp_path / "out/weights/a.safetensors").is_symlink()
    read(tmp_path / "out")


def test_across_filesystems_shards_are_copied(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(new_directory, "CHUNK", 100)
    monkeypatch.setattr(os, "link", link)
    write(tmp_path / "out", checkpoint, programs(), TARGET)
    shard = "a.safetensors"
    copied = tmp_path / "out/weights" / shard
    assert copied.read_bytes() == (checkpoint.path / shard).read_bytes()
    assert not copied.samefile(checkpoint.path / shard)
    out = tmp_path / "out"
    every = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert disk_use(out).extra == every


def test_what_exists_is_not_written_over(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetError) as caught:
        write(tmp_path / "out", checkpoint, programs(), TARGET)
    where = f"{tmp_path}/out"
    assert str(caught.value) == f"{where}: exists already; choose another directory or remove it"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("room", [0, 500, 1000, 2000])
def test_a_full_disk_leaves_nothing(
    room: int, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = os.write, room

    def write_until_full(descriptor: int, data: memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = whole(descriptor, data[: min(left, 700)])
        left -= count
        return count

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(TargetError) as caught:
        write(tmp_path / "out", checkpoint, programs(), TARGET)
    monkeypatch.undo()
    what = "the disk is full after 0 MB; free space or choose another directory"
    assert str(caught.value) == f"{tmp_path}/out: {what}"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_any_error_of_the_system_leaves_nothing(
    call: str, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TargetError) as caught:
        write(tmp_path / "out", checkpoint, programs(), TARGET)
    monkeypatch.undo()
    what = "cannot be written (Input/output error); choose another directory"
    assert str(caught.value) == f"{tmp_path}/out: {what}"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # nothing but write() runs
def test_a_killed_process_leaves_all_or_nothing(tmp_path: Path, checkpoint: Checkpoint) -> None:
    ready, turns = programs(), 10

    def written(out: Path) -> int:
        write(out, checkpoint, ready, TARGET)
        return 0

    begun = time.monotonic()
    written(tmp_path / "first")
    took = time.monotonic() - begun
    for turn in range(turns):
        out = tmp_path / f"out{turn}"
        pid = forked.started(lambda out=out: written(out))
        time.sleep(random.random() * took * 2)
        os.kill(pid, signal.SIGKILL)
        assert forked.ended(pid) in (0, -signal.SIGKILL)
        if not out.exists():
            written(out)  # the next compile cleans up
            assert not (tmp_path / f".{out.name}.{pid}.part").exists()
        read(out)
    assert leftovers(tmp_path) == sorted(["first", *(f"out{i}" for i in range(turns))])


def test_the_part_of_a_living_process_is_left(tmp_path: Path, checkpoint: Checkpoint) -> None:
    alive, dead = tmp_path / f".out.{os.getppid()}.part", tmp_path / ".out.4194305.part"
    other = tmp_path / ".outer.4194305.part"  # of another directory, and above the largest pid
    for folder in (alive, dead, other):
        folder.mkdir()
    write(tmp_path / "out", checkpoint, programs(), TARGET)
    assert leftovers(tmp_path) == sorted([alive.name, other.name])


def edited(file: str, old: str, new: str):
    def damage(out: Path) -> None:
        text = (out / file).read_text()
        assert old in text
        (out / file).write_text(text.replace(old, new))

    return damage


def both(old: str, new: str):
    def damage(out: Path) -> None:
        for phase in PHASES:
            edited(f"{phase}.py", old, new)(out)

    return damage


def dropped(file: str):
    return lambda out: (out / file).unlink()


def linked_outside(file: str):
    def damage(out: Path) -> None:
        (out / file).rename(out.parent / "elsewhere")
        (out / file).symlink_to(out.parent / "elsewhere")

    return damage


DAMAGED = {
    "no_manifest": (
        dropped("manifest.json"),
        "{out}: has no manifest.json; name what kvc8-compile wrote for npu",
    ),
    "format": (
        edited("manifest.json", '"format": 4', '"format": 2'),
        "{out}/manifest.json: has format 2 and this kvc8 reads 4; compile the model again",
    ),
    "soc": (
        edited("manifest.json", '"ascend910b"', "[]"),
        "{out}/manifest.json: soc is an array and should be a text; compile the model again",
    ),
    "parameters": (
        edited("manifest.json", "transpose", "reshape"),
        "{out}/manifest.json: parameters is not what the programs have; compile the model again",
    ),
    "no_program": (
        dropped("decode.py"),
        "{out}/decode.py: is not there; compile the model again",
    ),
    "syntax": (
        edited("prefill.py", "return [", "return ["[:-1] + "]"),
        "{out}/prefill.py: line 17: unmatched ']'; write one Python function",
    ),
    "stage": (
        edited("decode.py", "def lowered", "def lowering"),
        "{out}/decode.py: write: npu.npu_scatter_pa_kv_cache.default writes to k_cache_0; "
        "use its functional form",
    ),
    "type": (
        edited("decode.py", "head: f16[4, 16]", "head: f16[4, 8]"),
        "{out}/decode.py: logits: written as f16[R, 16] but is f16[R, 8]; correct the text",
    ),
    "expression": (
        edited("decode.py", '"), 0, 1)', '"), 0, 7)'),
        "{out}: head: is made in one way for prefill and in another for decode; "
        "give the two different names",
    ),
    "parameter": (
        both('"), 0, 1)', '"), 1, 1)'),
        "{out}: head: is declared f16[4, 16] and its expression makes f16[16, 4]; declare it so",
    ),
    "expression_arguments": (
        both('"), 0, 1)', '"), 0, 7)'),
        "{out}: head: transpose does not fit (Dimension out of range (expected to be in range of "
        "[-2, 1], but got 7)); correct it",
    ),
    "foreign_call": (
        edited("prefill.py", "aten.matmul(", "load_library.__call__.__call__("),
        "{out}/prefill.py: line 16: calls load_library.__call__.__call__, which is no op of an NPU "
        "program; compile the model again",
    ),
    "file_call": (
        edited("prefill.py", "aten.matmul(", "aten.from_file("),
        "{out}/prefill.py: line 16: calls aten.from_file, which is no op of an NPU program; "
        "compile the model again",
    ),
    "no_shard": (
        dropped("weights/a.safetensors"),
        "{out}/weights/model.safetensors.index.json: names a.safetensors, which is not there; "
        "copy that file too",
    ),
    "shard_outside": (
        linked_outside("weights/a.safetensors"),
        "{out}/weights/a.safetensors: is a link that leaves the model directory; "
        "copy the file here",
    ),
    "index_outside": (
        edited("weights/model.safetensors.index.json", '"a.safe', '"../../model/a.safe'),
        "{out}/weights/model.safetensors.index.json: names '../../model/a.safetensors', which is "
        "not the bare name of a file in the directory; copy the file into the directory and name "
        "it without a path",
    ),
    "no_derived": (
        dropped("derived.safetensors"),
        "{out}/derived.safetensors: is not there; compile the model again",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_artifact_is_refused_in_one_sentence(name: str, out: Path) -> None:
    damage, sentence = DAMAGED[name]
    damage(out)
    with pytest.raises(KVC8Error) as caught:
        read(out)
    assert str(caught.value) == sentence.format(out=out)


def test_weights_outside_are_refused(out: Path) -> None:
    linked_outside("weights")(out)
    with pytest.raises(TargetError) as caught:
        read(out)
    assert str(caught.value) == f"{out}/weights: is not a directory; compile the model again"


def test_where_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path / "none")
    where = f"{tmp_path}/none"
    assert str(caught.value) == f"{where}: no such directory; check the path of the model"


REFUSED = {
    "stage": (
        TEXT.replace("lowered", "lowering", 1),
        "decode: is a lowering program; run the passes of the npu target",
    ),
    "expression": (
        TEXT.replace('stored("scale")', 'stored("scales")'),
        "k_quant_scale_0: is made in one way for prefill and in another for decode; "
        "give the two different names",
    ),
    "tensor": (
        TEXT.replace("head", "heads").replace('transpose(stored("embed"', 'transpose(stored("e"'),
        "heads: e: is no stored tensor; correct the name",
    ),
    "type": (
        TEXT.replace("k_quant_scale_0: f32[4]", "k_quant_scale_0: f32[1]"),
        "k_quant_scale_0: is declared f32[1] and its expression makes f32[4]; declare it so",
    ),
    "caches": (
        TEXT.replace("[N, S, 1, 4]", "[N, S, 4, 1]").replace("1, 4]", "4, 1]"),
        "programs: prefill and decode differ in their caches; compile them from one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_that_could_not_be_read_is_not_written(
    name: str, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    text, sentence = REFUSED[name]
    with pytest.raises(IRError) as caught:
        write(tmp_path / "out", checkpoint, {**programs(), "decode": parse(text)}, TARGET)
    assert str(caught.value) == sentence
    assert os.listdir(tmp_path) == ["model"]
