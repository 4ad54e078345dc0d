"""Damage model directories at random from a seed, read each, and say what came of it.

`main` gives a list of outcomes: "opened", or the sentence of the refusal. Anything else is a
failure and ends the process: another exception, a directory that takes over 5 seconds, or one that
wants over 1 GB of memory beyond what the interpreter and its modules took before the first.
"""

import json
import random
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvc8.ir.checkpoint.reader import open_checkpoint, read_files
from kvc8.ir.errors import ModelError
from kvc8.tools.inspect import find
from kvc8.tools.inspector.seen import look

SECONDS, MEMORY = 5, 1 << 30
SENTENCE = re.compile(r"[^\n]+: [^\n]+; [^\n]*[^\n.]")
CONFIG: dict[str, object] = {
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "quantization_config": {"kv_quant_type": "C8", "group_size": 0},
}
STRANGE: list[object] = [
    *(None, True, -1, 0, 1, 2**63, 2**200, 0.5, float("nan"), float("inf")),
    *("", "C8", "FLOAT", "W8A8", "../x", "/etc/passwd", "a\nb", "\0", "\ud800", "é" * 300, "F16"),
    *(
        [],
        {},
        [0],
        [0, 8],
        [8, 0],
        [-1, 7],
        [[[]]],
        {"a": {}},
        [2**62, 2**62, 4],
        "model.safetensors",
    ),
]
FILES = [
    "config.json",
    "quant_model_description.json",
    "quant_model_weight_w8a8.safetensors.index.json",
    "quant_model_weight_w8a8-00001-of-00001.safetensors",
]
WEIGHTS = FILES[3]


def tensors() -> dict[str, Tensor]:
    k, v = (f"model.layers.0.self_attn.{side}_proj" for side in "kv")
    return {
        f"{k}.kv_cache_scale": torch.ones(2, dtype=torch.float16),
        f"{k}.kv_cache_offset": torch.zeros(2, dtype=torch.float16),
        f"{v}.kv_cache_scale": torch.ones(2, dtype=torch.float16),
        f"{v}.kv_cache_offset": torch.zeros(2, dtype=torch.float16),
        f"{k}.weight": torch.ones(2, 4, dtype=torch.int8),
        f"{k}.weight_scale": torch.ones(2, 1, dtype=torch.float16),
        f"{k}.input_scale": torch.ones(1),
        f"{k}.input_offset": torch.zeros(1),
        f"{k}.quant_bias": torch.zeros(2, dtype=torch.int32),
        f"{k}.deq_scale": torch.ones(2, dtype=torch.int64),
        "model.norm.weight": torch.ones(4),
        "model.norm.module.weight": torch.ones(4),
    }


def write(directory: Path) -> None:
    """Write a sharded ascendV1 directory, small enough to damage often."""
    directory.mkdir()
    stored = tensors()
    labels: dict[str, object] = {n: "C8" if ".kv_" in n else "W8A8" for n in stored}
    labels |= {"model.norm.weight": "FLOAT", "kv_cache_type": "C8", "group_size": 0, "kvc8": {}}
    index = {"metadata": {}, "weight_map": dict.fromkeys(stored, WEIGHTS)}
    for file, value in zip(FILES, (CONFIG, labels, index), strict=False):
        (directory / file).write_text(json.dumps(value))
    save_file(stored, directory / WEIGHTS)


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """Change, cut out or put in a few bytes."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(changed) + 1)
        new = dice.choice([b"", b"{", b'"', b"[" * 5000, b",", b"\xff", b"\0", dice.randbytes(3)])
        changed[at : at + dice.choice([0, 0, 1, 1, 8, 500])] = new
    return bytes(changed)


def change_value(value: object, dice: random.Random) -> object:
    """Change one value, name or length somewhere in what JSON holds."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        name = dice.choice(list(value))
        match dice.randrange(5):
            case 0:
                return {n: v for n, v in value.items() if n != name}
            case 1:
                return value | {str(dice.choice(STRANGE)): value[name]}
            case _:
                return value | {name: change_value(value[name], dice)}
    if isinstance(value, list) and value and dice.random() < 0.7:
        at = dice.randrange(len(value))
        return [*value[:at], change_value(value[at], dice), *value[at + 1 :]]
    return dice.choice(STRANGE)


def change_json(data: bytes, dice: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(dice.randint(1, 2)):
        value = change_value(value, dice)
    return json.dumps(value).encode()


def change_header(data: bytes, dice: random.Random) -> bytes:
    """Change what a weights file's header says, its length, or the file's."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    match dice.randrange(4):
        case 0:
            return struct.pack("<Q", dice.choice([0, 1, 2**40, 2**64 - 1, length + 8])) + data[8:]
        case 1:
            return data[: dice.randrange(len(data))]
        case 2:
            header = change_bytes(header, dice)
        case _:
            header = change_json(header, dice)
    return struct.pack("<Q", len(header)) + header + body


def damage(directory: Path, dice: random.Random) -> None:
    file = directory / dice.choice(FILES)
    changes: list[Callable[[bytes, random.Random], bytes]] = [change_bytes, change_json]
    if file.name == WEIGHTS:
        changes = [change_bytes, change_header, change_header, change_header]
    file.write_bytes(dice.choice(changes)(file.read_bytes(), dice))


def outcome(directory: Path) -> str:
    """Open and read everything: "opened", or the sentence of the refusal.

    What opens must be what safetensors itself reads, and kvc8-inspect must tell of it or refuse.
    """
    try:
        checkpoint = open_checkpoint(directory)
        whole = load_file(directory / WEIGHTS)
        for name, tensor in checkpoint.tensors.items():
            read = checkpoint.read(name)
            assert (tuple(read.shape), read.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(read.view(torch.uint8), whole[name].view(torch.uint8))
        assert all(SENTENCE.fullmatch(str(warning)) for warning in checkpoint.warnings)
        said = "opened"
    except ModelError as error:
        said = str(error)
    inspect(directory)
    return said.replace(str(directory), "DIR")


def inspect(directory: Path) -> None:
    """Whatever kvc8-inspect finds is told in one line each."""
    refusal, found = "", []
    try:
        found = find(look(read_files(directory)))
    except ModelError as error:
        refusal = str(error)
    assert SENTENCE.fullmatch(refusal) or found
    assert not [finding for finding in found if "\n" in str(finding)]


def limit_memory() -> None:
    """Allow a gigabyte beyond what is mapped for data now."""
    status = Path("/proc/self/status").read_text()
    [now] = re.findall(r"VmData:\s+(\d+) kB", status)
    most = int(now) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main(seed: int, count: int, scratch: Path) -> list[str]:
    """Damage and read `count` directories."""
    dice = random.Random(seed)
    write(scratch / "whole")
    outcomes = [outcome(scratch / "whole")]
    assert outcomes == ["opened"], outcomes
    limit_memory()
    for number in range(count):
        directory = scratch / str(number)
        shutil.copytree(scratch / "whole", directory)
        damage(directory, dice)
        signal.alarm(SECONDS)  # which ends the process
        outcomes.append(outcome(directory))
        signal.alarm(0)
        shutil.rmtree(directory)
    return outcomes[1:]
