"""Make the table of docs/models.md: what kvc8 does with each architecture that it is tried on.

    python tests/models_table.py [NAME ...] >table.md     # all of them take 25 minutes

Models are random, of two layers with heads of 64, in float32 for the comparison with transformers
and in float16 for the rest. A refusal is kvc8's own sentence; what is not one ends this script.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from support.architectures import captured, others, sizes
from support.c8 import TEXTS
from support.decoded import decoded
from support.tiny_models import KINDS, write_model, write_tokenizer

import kvc8
from kvc8.ir.errors import KVC8Error
from kvc8.tools.quantizer.settings import Settings

HEAD = 64
EXACT = 1e-5  # of the largest logit, or of one
HEADER = "| architecture | float32 | recipe kvc8 | minmax | NPU | ONNX | what stops it |"


@dataclass(frozen=True)
class Row:
    """What became of an architecture; what was not tried is "-"."""

    name: str
    off: str
    kvc8: str = "-"
    minmax: str = "-"
    npu: str = "-"
    onnx: str = "-"
    why: str = ""

    def __str__(self) -> str:
        made = (self.name, self.off, self.kvc8, self.minmax, self.npu, self.onnx, self.why)
        return f"| {' | '.join(made)} |"


def row(name: str, config: Mapping[str, object], at: Path) -> Row:
    """Try everything on one architecture, in a directory that is new."""
    given = {**sizes(HEAD), "num_attention_heads": 4, "num_key_value_heads": 2, **config}
    model_type = str(given.pop("model_type", name))
    if model_type in KINDS:  # which have narrower heads of their own
        given.setdefault("head_dim", HEAD)
    write = partial(write_model, kind=model_type, seed=0, config=given)
    write(at / "float32")
    write(at / "float16", dtype=torch.float16)
    write_tokenizer(at / "float16")
    (at / "texts").write_text("\n".join(TEXTS))
    sentences: list[str] = []
    tried = partial(attempt, at, sentences)
    off = tried(lambda: f"{decoded(at / 'float32'):.0e}")
    if off == "no":
        return Row(name, off, why=sentences[0])
    made = {recipe: tried(partial(quantized, at, recipe)) for recipe in ("kvc8", "minmax")}
    # what neither recipe takes needs none to compile, if its cache is of latents
    source = next((at / recipe for recipe, said in made.items() if said == "yes"), at / "float16")
    compile_ = partial(kvc8.compile, source)
    npu = tried(lambda: yes(compile_(target="npu", out=at / "npu")))
    onnx = tried(lambda: yes(compile_(target="onnx", flavor="standard", out=at / "onnx")))
    return Row(name, off, **made, npu=npu, onnx=onnx, why="; ".join(dict.fromkeys(sentences)))


def quantized(at: Path, recipe: str) -> str:
    """Quantize the float16 model."""
    given = Settings(recipe=recipe)  # type: ignore[arg-type]
    return yes(
        kvc8.quantize(at / "float16", out=at / recipe, calibration=at / "texts", settings=given)
    )


def yes(_: object) -> str:
    """What was to be made is there."""
    return "yes"


def attempt(at: Path, sentences: list[str], work: Callable[[], str]) -> str:
    """What `work` gives, or "no" and kvc8's sentence, without the directory."""
    try:
        return work()
    except KVC8Error as error:
        sentences.append(str(error).replace(f"{at}/", "").replace("|", "\\|"))
        return "no"


def rows(names: list[str]) -> Iterator[Row]:
    """The rows of some architectures, or of all."""
    for name, config in sorted({**captured(HEAD), **others(HEAD)}.items()):
        if not names or name in names:
            with TemporaryDirectory() as directory:
                yield row(name, config, Path(directory))


def main() -> None:
    """Print the table and what it counts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what each model is warned of is tested elsewhere
    print(f"{HEADER}\n|{'---|' * 7}")
    found = []
    for made in rows(sys.argv[1:]):
        print(made, flush=True)
        found.append(made)
    exact = sum(r.off != "no" and float(r.off) <= EXACT for r in found)
    reach = sum(r.npu == "yes" for r in found)
    onnx = sum(r.onnx == "yes" for r in found)
    print(f"\n{len(found)} architectures: {exact} captured within 1e-5 of transformers, ", end="")
    print(f"{reach} reach the NPU, {onnx} ONNX Runtime.")


if __name__ == "__main__":
    main()
