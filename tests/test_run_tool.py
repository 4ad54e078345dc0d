"""What kvc8-run prints, and how it and every command end."""

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from support import forked

from kvc8.backends.npu.artifact import CompiledFor, write
from kvc8.backends.npu.device import load_torch_npu
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelError, TargetError
from kvc8.passes import pipeline
from kvc8.tools import run, verify
from kvc8.tools.command import entry
from kvc8.tools.driver.tokenizer import TextStream, read_tokenizer

pytestmark = pytest.mark.slow  # minutes in all; `tools/check --quick` leaves them out


GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
EMULATED = "emulated on a CPU, as documented; not verified on a device"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = open_checkpoint(GOLDEN)
    program = capture(checkpoint)
    pipeline.run(program, pipeline.QUANTIZE)
    lowered, _ = pipeline.lower_for_npu(program)
    path = tmp_path_factory.mktemp("run") / "out"
    write(path, checkpoint, lowered, CompiledFor("ascend910b", 32))
    return path


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = run.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def test_text_goes_to_stdout_and_what_it_cost_to_stderr(out, capsys) -> None:
    status, text, cost = ran(capsys, out, "--prompt", "hello", "--max-new-tokens", 6)
    assert status == 0
    ids = json.loads(ran(capsys, out, "--prompt", "hello", "--max-new-tokens", 6, "--json")[1])[
        "sequences"
    ][0]["tokens"]
    assert text == read_tokenizer(out).decode(ids) + "\n"
    assert "512 bytes, 50% of float16's 1,024" in cost
    assert "".join(cost.split()).endswith("".join(EMULATED.split()))


def test_several_prompts_are_labeled_and_whole(out, capsys) -> None:
    prompts = ["--prompt", "a", "--prompt", "bcd", "--prompt", "e", "--max-new-tokens", 5]
    _, text, _ = ran(capsys, out, *prompts)
    _, whole, _ = ran(capsys, out, *prompts, "--blocks", 1, "--json")
    texts = [sequence["text"] for sequence in json.loads(whole)["sequences"]]
    assert text == "".join(f"[{i}] {found}\n" for i, found in enumerate(texts, 1))


def test_json_holds_everything(out, capsys) -> None:
    status, text, errors = ran(capsys, out, "--prompt", "hey", "--max-new-tokens", 3, "--json")
    assert (status, errors) == (0, "")
    found = json.loads(text)
    assert set(found) == {"sequences", "statistics", "note"}
    assert found["note"] == EMULATED
    (sequence,) = found["sequences"]
    assert sequence["prompt"] == "hey"
    assert len(sequence["tokens"]) == 3
    assert sequence["finish"] == "length"
    assert found["statistics"]["bytes_per_token"] == 512


def test_a_seed_repeats_a_text(out, capsys) -> None:
    chosen = [out, "--prompt", "x", "--max-new-tokens", 8, "--temperature", 2, "--json"]
    seeds = [ran(capsys, *chosen, "--seed", seed)[1] for seed in (1, 1, 2)]
    texts = [json.loads(text)["sequences"][0]["tokens"] for text in seeds]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--chat"],
            "error: {out}: has no chat template; give --no-chat\n",
        ),
        (
            ["--temperature", "-1"],
            "error: temperature: is -1.0; give 0 or a positive number\n",
        ),
        (
            ["--blocks", "1"],
            "error: prompt 1: 1 tokens and 64 to generate take 2 blocks of 32 and the cache has "
            "1; allow 2 blocks or generate fewer tokens\n",
        ),
        (
            ["--max-new-tokens", "2048"],
            "error: --prompt: 1 tokens and 2048 to generate are more than the model's 2048; "
            "shorten the prompt or give a lower --max-new-tokens\n",
        ),
    ],
)
def test_what_cannot_be_done_is_told_in_one_sentence(out, capsys, arguments, sentence) -> None:
    found = ran(capsys, out, "--prompt", "x", *arguments)
    assert found == (1, "", sentence.format(out=out))


def test_a_machine_without_torch_npu(out, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # as where it is not installed
    found = ran(capsys, out, "--prompt", "x", "--device", "npu")
    what = "install kvc8[npu] on a machine with CANN, or give --device cpu"
    assert found == (1, "", f"error: torch_npu: is not installed; {what}\n")


@pytest.fixture
def broken_torch_npu(tmp_path, monkeypatch) -> None:
    """torch_npu as it is where CANN is not: installed, and not to be loaded."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


def test_a_machine_without_cann(out, capsys, monkeypatch, broken_torch_npu) -> None:
    monkeypatch.delitem(sys.modules, "kvc8.ir.npu")
    found = ran(capsys, out, "--prompt", "x", "--device", "npu")
    what = "install kvc8[npu] on a machine with CANN, or give --device cpu"
    why = "libhccl.so: cannot open"
    assert found == (1, "", f"error: torch_npu: does not load ({why}); {what}\n")


def test_torch_npu_comes_first(broken_torch_npu) -> None:
    with pytest.raises(TargetError) as caught:
        load_torch_npu()
    what = "kvc8.ir.npu was imported before it; call load_torch_npu() first"
    assert str(caught.value) == f"torch_npu: {what}"


def test_a_dump_is_compared_node_by_node(out, capsys, tmp_path) -> None:
    dump = tmp_path / "values.safetensors"
    status, _, _ = ran(capsys, out, "--prompt", "ab", "--max-new-tokens", "2", "--dump", dump)
    assert status == 0
    arguments = verify.parser().parse_args(["dump", str(out), str(dump), "--json"])
    assert verify.work(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["phase"] for each in found} == {"prefill", "decode"}
    assert {each["op"] for each in found} >= {"npu_quant_matmul", "cache"}
    assert not any(each["differ"] for each in found)  # a CPU agrees with itself
    arguments.json = False
    assert verify.work(arguments) == 0
    assert "npu_quant_matmul" in capsys.readouterr().out
    assert ran(capsys, out, "--prompt", "ab", "--dump", dump) == (
        1,
        "",
        f"error: {dump}: exists already; choose another file or remove it\n",
    )


def test_graphs_are_of_the_npu(out, capsys) -> None:
    found = ran(capsys, out, "--prompt", "x", "--graph")
    what = "is of --device npu; leave it out, or run on an NPU"
    assert found == (1, "", f"error: --graph: {what}\n")


def test_where_there_is_no_artifact(tmp_path, capsys) -> None:
    found = ran(capsys, tmp_path, "--prompt", "x")
    what = "has no manifest.json; name what kvc8-compile wrote for npu"
    assert found == (1, "", f"error: {tmp_path}: {what}\n")


def test_wrong_usage_is_2(tmp_path, capsys) -> None:
    status, _, errors = ran(capsys, tmp_path)
    assert status == 2
    assert errors.endswith("the following arguments are required: --prompt\n")
    status, _, errors = ran(capsys, tmp_path, "--prompt", "x", "--blocks", "0")
    assert status == 2
    assert errors.endswith("argument --blocks: 0 is no positive number\n")


def ended(capsys: pytest.CaptureFixture[str], work, *arguments: str) -> tuple[int, str, str]:
    return entry(argparse.ArgumentParser(), work, arguments), *capsys.readouterr()


def raising(error: BaseException):
    def work(_: argparse.Namespace) -> int:
        raise error

    return work


def test_how_commands_end(capsys) -> None:
    assert ended(capsys, lambda _: 0) == (0, "", "")
    wrong = ModelError("model", "is wrong", "mend it")
    assert ended(capsys, raising(wrong)) == (1, "", "error: model: is wrong; mend it\n")
    lost = FileNotFoundError(2, "No such file or directory", "a.txt")
    said = "error: a.txt: No such file or directory; check the path\n"
    assert ended(capsys, raising(lost)) == (1, "", said)
    assert ended(capsys, raising(KeyboardInterrupt())) == (130, "", "")
    with pytest.raises(ModelError, match="model: is wrong; mend it"):
        ended(capsys, raising(wrong), "--traceback")


def test_only_our_warnings_are_shown(capsys) -> None:
    def work(_: argparse.Namespace) -> int:
        warnings.warn_explicit("model: odd; look", UserWarning, "x.py", 1, "kvc8.ir.capture.trace")
        warnings.warn_explicit("theirs", DeprecationWarning, "y.py", 1, "transformers.models")
        return 0

    shown = warnings.showwarning
    assert ended(capsys, work) == (0, "", "warning: model: odd; look\n")
    assert warnings.showwarning is shown


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # nothing but main() runs
def test_a_reader_that_has_seen_enough(out, tmp_path) -> None:
    given = [str(out), "--prompt", "x", "--max-new-tokens", "1", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    with (tmp_path / "err").open("w+") as err:
        pid = forked.started(lambda: run.main(given), out=writing, err=err.fileno())
        os.close(writing)
        assert forked.ended(pid) == 1
        assert err.read() == ""


def test_a_character_of_several_tokens_is_shown_when_it_is_complete(out) -> None:
    tokenizer = read_tokenizer(out)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode("aé€b")]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == "aé€b"


def test_a_directory_without_a_tokenizer(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        read_tokenizer(tmp_path)
    where, what = f"{tmp_path}: its tokenizer cannot be read (", "copy the tokenizer's files there"
    assert str(caught.value).startswith(where)
    assert str(caught.value).endswith(what)
    assert "\n" not in str(caught.value)


def test_a_broken_chat_template(out, tmp_path) -> None:
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(ModelError) as caught:
        read_tokenizer(tmp_path / "out").encode("x", chat=True)
    assert str(caught.value) == f"{tmp_path}/out: its chat template fails (no); give --no-chat"
