"""Quantized checkpoints of tiny models: W8A8 or float linears, zero points to the extremes."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvc8.tools import command, quantize

WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8.safetensors", "quant_model_description.json"
TEXTS = ("The sea is a very large thing.", "12 + 30 = 42", "def f(x): return x", "Why not? ~!{}")


def quantize_model(source: Path, out: Path, linears: str = "w8a8") -> None:
    """Write a float model with an int8 cache.

    `linears` are "w8a8" (which leaves down_proj float), "all" (in W8A8) or "float".
    """
    texts = out.with_suffix(".txt")
    texts.write_text("\n".join(TEXTS))
    options = {"float": ["--disable", "*"], "all": ["--down-proj"]}.get(linears, [])
    given = [str(source), "-o", str(out), "--calib-file", str(texts), "--recipe", "minmax"]
    arguments = [*given, *options]
    assert command.entry(quantize.parser(), quantize.work, arguments) == 0


def with_offsets(source: Path, out: Path) -> Path:
    """A copy whose K and V have a zero point a channel, of all from -128 to 127."""
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS)
    random = torch.Generator().manual_seed(0)
    for name, x in sorted(tensors.items()):
        if name.endswith("kv_cache_offset"):
            zero = torch.randint(-128, 128, x.shape, generator=random)
            zero[:4] = torch.tensor([-128, 127, 0, -1])
            tensors[name] = zero.to(x.dtype)
    save_file(tensors, out / WEIGHTS)
    return out


def before_rope(source: Path, out: Path) -> Path:
    """A copy that says of its K scales that they were measured before RoPE, as the vendor's are."""
    shutil.copytree(source, out)
    found = json.loads((out / DESCRIPTION).read_text())
    del found["kvc8"]["kv_calibrated"]
    (out / DESCRIPTION).write_text(json.dumps(found))
    return out
