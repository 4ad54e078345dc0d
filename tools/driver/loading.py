"""A compiled model that runs: what kvc8-run and kvc8.load do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kvc8.backends.runtime.generate import Generation, StepModel, generate
from kvc8.backends.runtime.model import load
from kvc8.backends.runtime.sampling import Sampling
from kvc8.ir.checkpoint.model_files import read_json
from kvc8.ir.errors import ModelError, TargetError
from kvc8.tools.driver.ranks import ALONE, Ranks, check_ranks, check_size
from kvc8.tools.driver.tokenizer import Tokenizer, read_tokenizer

CPU = torch.device("cpu")
EMULATED = "emulated on a CPU, as documented; not verified on a device"
ON_DEVICE = "run on an NPU, which kvc8's authors have not done: compare with --device cpu"
IN_ONNX_RUNTIME = "run in ONNX Runtime on a CPU, flavor {}"


@dataclass(frozen=True)
class Generated:
    """A prompt and what was generated for it."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    text: str  # of `tokens`
    finish: str  # "stop" or "length"


@dataclass(frozen=True)
class Loaded:
    """A compiled model, on a device or emulated on a CPU."""

    path: Path
    config: Mapping[str, object]  # the model's own config.json
    note: str  # how it is run, and whether that was verified
    # Caches for sequences of so many tokens each, in so many blocks (None: enough), and the model.
    allocate: Callable[[Sequence[int], int | None], StepModel]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that lies in the directory."""
        return read_tokenizer(self.path)

    def encode(self, prompts: Sequence[str], chat: bool | None = None) -> list[list[int]]:
        """The tokens of prompts; as messages where `chat`, or where the model has a template."""
        as_messages = self.tokenizer.has_chat if chat is None else chat
        return [self.tokenizer.encode(prompt, as_messages) for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool | None = None,
    ) -> list[Generated]:
        """Continue texts, all at once; `temperature` 0 takes the likeliest token.

        Raises ModelError where a prompt with its new tokens is longer than the model's positions.
        """
        rows = self.encode(prompts, chat)
        check_lengths(self.config, rows, max_new_tokens)
        model = self.allocate([len(row) + max_new_tokens for row in rows], None)
        made: Generation = generate(
            model,
            rows,
            most=max_new_tokens,
            stops=self.tokenizer.stops,
            sampling=Sampling(temperature, top_p, seed),
        )
        return [
            Generated(s.prompt, s.generated, self.tokenizer.decode(s.generated), s.finish)
            for s in made.sequences
        ]


def open_compiled(
    path: Path, device: torch.device = CPU, threads: int = 0, ranks: Ranks = ALONE
) -> Loaded:
    """Open what kvc8-compile wrote, for npu or for onnx, with its parameters on a device.

    `threads` are of ONNX Runtime; 0 is one a core. For an NPU `device` is what
    backends.npu.device.load_torch_npu gave; with `ranks`, those of one rank. Raises IRError,
    ModelError or TargetError where the directory is damaged or not compiled for so many ranks, or
    an ONNX model should run on an NPU.
    """
    return _onnx(path, device, threads, ranks) if is_onnx(path) else _artifact(path, device, ranks)


def is_onnx(path: Path) -> bool:
    """Whether a directory says that it holds an ONNX model; any other is read as an artifact."""
    manifest = path / "manifest.json"
    return manifest.is_file() and read_json(manifest).get("format") == "kvc8-onnx"


def check_lengths(
    config: Mapping[str, object], prompts: Sequence[Sequence[int]], most: int
) -> None:
    """Refuse what goes past the positions that the model was made for."""
    limit = config.get("max_position_embeddings")
    longest = max(map(len, prompts))
    if isinstance(limit, int) and longest + most > limit:
        what = f"{longest} tokens and {most} to generate are more than the model's {limit}"
        raise ModelError("--prompt", what, "shorten the prompt or give a lower --max-new-tokens")


def _onnx(path: Path, device: torch.device, threads: int, ranks: Ranks) -> Loaded:
    from kvc8.backends.onnx.model import open_model  # onnxruntime takes a second to import

    if device.type != "cpu":
        what = "an ONNX model runs in ONNX Runtime on a CPU"
        raise TargetError("--device", what, "leave it out, or compile the model for npu")
    check_size(path, 1, ranks)
    model = open_model(path, threads)

    def allocate(tokens: Sequence[int], blocks: int | None) -> StepModel:
        model.allocate(blocks, tokens)
        return model

    return Loaded(path, model.config, IN_ONNX_RUNTIME.format(model.flavor), allocate)


def _artifact(path: Path, device: torch.device, ranks: Ranks) -> Loaded:
    from kvc8.backends.npu.artifact_reader import read  # declares the NPU's ops

    artifact = read(path)
    check_ranks(artifact, ranks, device)
    programs, size = artifact.of_rank(ranks.rank), artifact.block_size

    def allocate(tokens: Sequence[int], blocks: int | None) -> StepModel:
        count = blocks or sum(-(-each // size) for each in tokens)
        return load(programs, artifact.make, blocks=count, block_size=size, device=device)

    return Loaded(path, artifact.config, EMULATED if device.type == "cpu" else ON_DEVICE, allocate)
