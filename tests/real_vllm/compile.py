"""Make what the checks serve, in kvc8's own environment, for vLLM's has an older transformers.

python compile.py MODEL OUT

OUT/c8, OUT/w8a8          MODEL with an int8 cache, its linears float or all of them W8A8
OUT/c8-npu, OUT/w8a8-npu  what kvc8-compile makes of them
OUT/w8a8-3-ranks          the same of OUT/w8a8 for three ranks: SmolLM2 has 9 and 3 heads
OUT/tiny, OUT/tiny-npu    a model of 4 and 2 heads with random weights, all W8A8; and for two ranks
OUT/tiny-2-ranks
OUT/vllm-ascend/NAME      the vendor's directories of tests/golden, converted and mended
OUT/mindie/NAME           one of them, in the form that MindIE wants
OUT/exact                 the QUANTIZED program of OUT/c8 in float64, for plugin/kvc8_checks.py
OUT/tokens.json           the prompts, what kvc8's own loop continues them with in float64, and how
                          likely the tokens of the first one are; and what it gives with c8-npu,
                          one prompt after the other, and with w8a8-npu and tiny-npu, at once
"""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
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
from kvc8.tools import command, convert, quantize, run
from kvc8.tools import compile as compiler
from kvc8.tools.driver.loading import open_compiled
from kvc8.tools.driver.tokenizer import read_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.tiny_models import write_model, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTHS = (30, 41, 64, 97, 150, 222, 384, 600)  # tokens of the prompts
NEW, BLOCK = 20, 16
TEXT = "LICENSE"  # what the prompts are parts of; each begins elsewhere
TEXTS = ("The sea is", "A compiler reads a program and")  # what an artifact continues over HTTP
FEW = 6  # tokens that it does by
CALIBRATION = 4  # texts; accuracy is measured elsewhere
TINY = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
TINY_PROMPTS = [[(7 * i + n) % 120 + 1 for i in range(n)] for n in (20, 33, 64)]


def main(model: str, out: str) -> None:
    """Write all of it."""
    folder = Path(out)
    tiny = folder / "tiny-float"
    tiny.mkdir()
    write_model(tiny, "llama", 0, TINY, torch.float16)
    write_tokenizer(tiny)
    quantized(Path(model), folder / "c8", "--disable", "*")
    quantized(Path(model), folder / "w8a8", "--down-proj")
    quantized(tiny, folder / "tiny", "--down-proj")
    for name in ("c8", "w8a8", "tiny"):
        compiled(folder / name, folder / f"{name}-npu")
    compiled(folder / "w8a8", folder / "w8a8-3-ranks", "--tp", "3")
    compiled(folder / "tiny", folder / "tiny-2-ranks", "--tp", "2")
    for golden in sorted((ROOT / "tests/golden/checkpoints").glob("*/quant")):
        converted(golden, folder, "vllm-ascend")
    converted(ROOT / "tests/golden/checkpoints/llama_fp16_m3/quant", folder, "mindie")
    found = expected(folder / "c8", exact(folder / "c8", folder / "exact"))
    found["texts"] = [told(folder / "c8-npu", text) for text in TEXTS]
    prompts = {"w8a8": found["prompts"][:3], "tiny": TINY_PROMPTS}  # type: ignore[index]
    found["whole"] = {
        name: {"prompts": some, "generated": continued(folder / f"{name}-npu", some)}
        for name, some in prompts.items()
    }
    (folder / "tokens.json").write_text(json.dumps(found))


def quantized(model: Path, out: Path, *options: str) -> None:
    """Quantize a model on a few texts."""
    lines = (ROOT / "tests/data/calibration.jsonl").read_text().splitlines(keepends=True)
    texts = out.with_suffix(".jsonl")
    texts.write_text("".join(lines[:CALIBRATION]))
    given = [str(model), "-o", str(out), "--recipe", "minmax", "--calib-file", str(texts)]
    typed(quantize, [*given, *options])


def compiled(model: Path, out: Path, *options: str) -> None:
    """Compile a model for an NPU: a prompt in chunks says what it says whole."""
    typed(
        compiler, [str(model), "-o", str(out), "--target", "npu", "--prefill-kv", "int8", *options]
    )


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


def told(artifact: Path, text: str) -> dict[str, object]:
    """What kvc8-run says after a text: the text, and the tokens."""
    torch.set_num_threads(1)  # as the server has them, for more may add floats in another order
    with redirect_stdout(io.StringIO()) as printed:
        arguments = ["--prompt", text, "--no-chat", "--max-new-tokens", str(FEW), "--json"]
        assert run.main([str(artifact), *arguments]) == 0
    [found] = json.loads(printed.getvalue())["sequences"]
    return {key: found[key] for key in ("prompt", "text", "tokens")}


def continued(artifact: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What kvc8-run's loop continues prompts with, all at once."""
    torch.set_num_threads(1)
    model = open_compiled(artifact).allocate([len(prompt) + FEW for prompt in prompts], None)
    return [sequence.generated for sequence in generate(model, prompts, most=FEW).sequences]


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
