"""Make what the checks serve, in kvc8's own environment, for vLLM's has an older transformers.

python compile.py MODEL OUT

OUT/c8, OUT/w8a8          MODEL with an int8 cache, its linears float or W8A8
OUT/c8-npu, OUT/w8a8-npu  what kvc8-compile makes of them
OUT/vllm-ascend/NAME      the vendor's directories of tests/golden, converted and mended
OUT/mindie/NAME           one of them, in the form that MindIE wants
OUT/exact                 the QUANTIZED program of OUT/c8 in float64, for plugin/kvc8_checks.py
OUT/tokens.json           the prompts, what kvc8's own loop continues them with in float64, and how
                          likely the tokens of the first one are
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.model import Model, load
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program
from kvc8.ir.text import show
from kvc8.passes import pipeline
from kvc8.tools import command, convert, quantize
from kvc8.tools import compile as compiler
from kvc8.tools.driver.tokenizer import read_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTHS = (30, 41, 64, 97, 150, 222, 384, 600)  # tokens of the prompts
NEW, BLOCK = 20, 16
TEXT = "LICENSE"  # what the prompts are parts of; each begins elsewhere


def main(model: str, out: str) -> None:
    """Write all of it."""
    folder = Path(out)
    for name, options in (("c8", ["--disable", "*"]), ("w8a8", [])):
        arguments = [model, "-o", str(folder / name), "--recipe", "minmax", *options]
        calibration = ["--calib-file", str(ROOT / "tests/data/calibration.jsonl")]
        typed(quantize, [*arguments, *calibration])
        artifact = [str(folder / name), "-o", str(folder / f"{name}-npu"), "--target", "npu"]
        typed(compiler, [*artifact, "--prefill-kv", "int8"])
    for golden in sorted((ROOT / "tests/golden/checkpoints").glob("*/quant")):
        converted(golden, folder, "vllm-ascend")
    converted(ROOT / "tests/golden/checkpoints/llama_fp16_m3/quant", folder, "mindie")
    program = exact(folder / "c8", folder / "exact")
    (folder / "tokens.json").write_text(json.dumps(expected(folder / "c8", program)))


def converted(golden: Path, folder: Path, engine: str) -> None:
    """Write a golden directory as an engine wants it."""
    out = folder / engine / golden.parent.name
    out.parent.mkdir(exist_ok=True)
    typed(convert, [str(golden), "--for", engine, "-o", str(out)])


def typed(tool, arguments: list[str]) -> None:
    """Run a command as one types it."""
    assert command.entry(tool.parser(), tool.work, arguments) == 0


def exact(model: Path, out: Path) -> Program:
    """Write the program in float64, and what vLLM reads beside it."""
    program = capture(open_checkpoint(model))
    pipeline.run(program, pipeline.QUANTIZE)
    wide = widen(program)
    out.mkdir()
    (out / "program.py").write_text(show(wide) + "\n")
    (out / "checkpoint").symlink_to(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model / name).exists():
            shutil.copy(model / name, out)
    config = json.loads((model / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("quantize", "quantization_config")}
    kept["architectures"] = ["Kvc8ExactForCausalLM"]
    (out / "config.json").write_text(json.dumps(kept))
    return wide


def expected(model: Path, program: Program) -> dict[str, object]:
    """The prompts, and the tokens that kvc8's own loop continues them with."""
    torch.set_num_threads(2)
    ids = read_tokenizer(model).encode((ROOT / TEXT).read_text(), False)
    prompts = [ids[29 * i : 29 * i + length] for i, length in enumerate(LENGTHS)]
    phases = dict.fromkeys(("prefill", "chunk", "decode"), program)
    blocks = sum(-(-(length + NEW) // BLOCK) for length in LENGTHS)
    read = partial(make, read=open_checkpoint(model).read)
    own = load(phases, read, blocks=blocks, block_size=BLOCK)
    found = generate(own, prompts, most=NEW)
    known = {"prompts": prompts, "generated": [s.generated for s in found.sequences]}
    return known | {"first_prompt": likelihood(own, prompts[0])}


def likelihood(own: Model, prompt: list[int]) -> dict[str, object]:
    """The log-probability of each token of a prompt but the first, and the size of the logits."""
    logits = own.prefill([prompt], [range(-(-len(prompt) // BLOCK))], every=True)
    rows = logits.log_softmax(-1)[:-1]
    return {
        "log_probabilities": rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist(),
        "greatest": logits.abs().max().item(),
        "vocabulary": logits.shape[-1],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
