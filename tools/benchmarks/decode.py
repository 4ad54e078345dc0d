"""A decode step: kvc8's gqa flavor and emulated artifact, a plain graph, transformers, OpenVINO.

The plain graph is of com.microsoft.GroupQueryAttention and float weights. The artifact computes in
float16 what the documents of the NPU's ops say.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.runner import load
from kvc8.backends.runtime import model as runtime
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools.benchmarks import plain as bench_plain
from kvc8.tools.benchmarks.stateful import Stateful
from kvc8.tools.driver.compiling import compile_model, quantize
from kvc8.tools.driver.request import Target

CONTEXTS = (128, 2048, 8192)
TOKEN = 5  # any
Step = Callable[[], object]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("directory", type=Path, help="the model in W8A8 with an int8 KV cache")
    parser.add_argument("float_directory", type=Path, help="the float model that it was made of")
    exported = "the float model as optimum-intel exports it; without it OpenVINO is left out"
    parser.add_argument("--openvino", type=Path, metavar="DIR", help=exported)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="N")
    chosen = "what to time; ratios are to the first; default: all"
    each = tuple(MAKERS)
    parser.add_argument("--candidates", nargs="+", choices=each, default=each, help=chosen)


def cases(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Step]]]:
    """At each context the candidates; each call decodes the token that ends it."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="kvc8-bench-") as folder:
        made = [MAKERS[name](args, Path(folder)) for name in args.candidates if _known(name, args)]
        for context in args.contexts:
            yield f"context {context}", {each.title: each.step(context) for each in made}


def _known(name: str, args: argparse.Namespace) -> bool:
    return name != "openvino" or args.openvino is not None


class _Gqa:
    """The gqa flavor in ONNX Runtime."""

    title = "kvc8 gqa, W8A8"

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        checkpoint = open_checkpoint(args.directory)
        program = capture(checkpoint, torch.float32)
        quantize(program)
        emit(program, checkpoint, scratch / "gqa", "gqa")
        self.session = load(scratch / "gqa", args.threads)

    def step(self, context: int) -> Step:
        sizes = {"B": 1, "L": context}
        ports = self.session.caches
        shapes = [[sizes[d] if isinstance(d, str) else d for d in port.shape] for port in ports]
        caches = {p.name: x for p, x in zip(ports, _codes(shapes), strict=True)}
        given = step_inputs(context)
        self.session.run({**given, **caches})
        return lambda: self.session.run(given)


class _Emulated:
    """The artifact for an NPU, with every op of it computed on a CPU."""

    title = "kvc8 emulated, W8A8"

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        target = Target("npu", dtype="float16")
        compile_model(open_checkpoint(args.directory), scratch / "npu", target)
        self.artifact = read(scratch / "npu")

    def step(self, context: int) -> Step:
        size, decode = self.artifact.block_size, self.artifact.of_rank(0)["decode"]
        blocks = list(range(-(-context // size)))
        make = self.artifact.make
        model = runtime.load({"decode": decode}, make, blocks=len(blocks), block_size=size)
        caches = list(model.caches.values())
        for cache, codes in zip(caches, _codes([x.shape for x in caches]), strict=True):
            cache.copy_(codes)
        return lambda: model.decode([TOKEN], [context], [blocks])


class _Plain:
    """A hand-written graph with the same attention op."""

    title = "plain gqa, float weights"

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        weights, scales = open_checkpoint(args.float_directory), open_checkpoint(args.directory)
        self.graph = bench_plain.Plain(weights, scales, args.threads)

    def step(self, context: int) -> Step:
        return self.graph.step(TOKEN, _codes(self.graph.caches(context)))


class _OpenVino:
    """OpenVINO's own cache."""

    title = "OpenVINO u8, float weights"

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.model = Stateful(args.openvino, args.threads)

    def step(self, context: int) -> Step:
        return self.model.step(TOKEN, context)


def _codes(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Random codes, spread as those of normal values are: their deviation is 32."""
    random = torch.Generator().manual_seed(0)
    spread = (32 * torch.randn(tuple(shape), generator=random) for shape in shapes)
    return [x.round().clamp(-128, 127).to(torch.int8) for x in spread]


def step_inputs(context: int) -> dict[str, Tensor]:
    """The inputs of one decode step of the gqa flavor."""
    i32 = torch.int32
    return {
        "input_ids": torch.tensor([[TOKEN]]),
        "positions": torch.tensor([[context - 1]]),
        "seq_lens": torch.tensor([context], dtype=i32),
        "query_lens": torch.tensor([1], dtype=i32),
        "logits_rows": torch.tensor([0]),
    }


class _Transformers:
    """The float model as transformers runs it, with its own cache."""

    title = "transformers, float32"

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        from transformers import AutoModelForCausalLM

        found = AutoModelForCausalLM.from_pretrained(args.float_directory, dtype=torch.float32)
        self.model = found.eval()

    def step(self, context: int) -> Step:
        from transformers import DynamicCache

        config = self.model.config
        heads, dim = config.num_key_value_heads, config.head_dim
        past = context - 1
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(1, heads, past, dim) for _ in range(2))
            cache.update(k, v, layer)

        def decode() -> object:
            with torch.no_grad():
                made = self.model(torch.tensor([[TOKEN]]), past_key_values=cache, use_cache=True)
            cache.crop(-1)
            return made

        return decode


class Candidate(Protocol):
    """Something to time, made once."""

    title: str

    def step(self, context: int) -> Step:
        """What decodes the token that ends a context of so many."""


MAKERS: Mapping[str, Callable[[argparse.Namespace, Path], Candidate]] = MappingProxyType(
    {
        "gqa": _Gqa,
        "emulated": _Emulated,
        "plain": _Plain,
        "transformers": _Transformers,
        "openvino": _OpenVino,
    }
)
