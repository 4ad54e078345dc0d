"""A damaged directory opens and reads, or is refused in one sentence; nothing else happens.

Directories are damaged at random from fixed seeds: bytes of the header and of JSON, values in
them, lengths of files. `python -m pytest tests/test_checkpoint_fuzz.py` runs 1,600 in seconds.
"""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvc8.ir.checkpoint import open_checkpoint
from kvc8.ir.errors import ModelError

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
    """Open and read everything: "opened", or the sentence of the refusal."""
    try:
        checkpoint = open_checkpoint(directory)
        for name, tensor in checkpoint.tensors.items():
            assert tuple(checkpoint.read(name).shape) == tensor.shape
        assert all(SENTENCE.fullmatch(warning) for warning in checkpoint.warnings)
    except ModelError as error:
        return str(error)
    return "opened"


def test_the_directory_opens_when_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    assert outcome(tmp_path / "whole") == "opened"


@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_directory_opens_or_is_refused_in_one_sentence(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    write(tmp_path / "whole")
    outcomes = []
    for number in range(100):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", directory)
        damage(directory, dice)
        outcomes.append(outcome(directory))
    refusals = [said for said in outcomes if said != "opened"]
    assert [said for said in refusals if not SENTENCE.fullmatch(said)] == []
    assert len(refusals) > 50  # most damage is noticed
    assert len(set(refusals)) > 25
