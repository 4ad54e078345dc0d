"""One decode step: kvc8's gqa flavor, a plain GroupQueryAttention graph, transformers, OpenVINO."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.runner import Session, load
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.tools.benchmarks import plain as bench_plain
from kvc8.tools.benchmarks.stateful import Stateful
from kvc8.tools.driver.compiling import quantize

CONTEXTS = (128, 2048, 8192)
TOKEN = 5  # any


def arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark is told."""
    parser.add_argument("directory", type=Path, help="the model in W8A8 with an int8 KV cache")
    parser.add_argument("float_directory", type=Path, help="the float model that it was made of")
    exported = "the float model as optimum-intel exports it; without it OpenVINO is left out"
    parser.add_argument("--openvino", type=Path, metavar="DIR", help=exported)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="N")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """At each context the candidates, ours first; each call decodes the token that ends it."""
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.directory)
    plain = bench_plain.Plain(open_checkpoint(args.float_directory), checkpoint, args.threads)
    theirs = _Transformers(args.float_directory)
    openvino = Stateful(args.openvino, args.threads) if args.openvino else None
    with tempfile.TemporaryDirectory(prefix="kvc8-bench-") as folder:
        session = _compiled(checkpoint, Path(folder) / "out", args.threads)
        for context in args.contexts:
            codes = _codes(session, context)
            candidates = {
                "kvc8 gqa, W8A8": _step(session, codes),
                "plain gqa, float weights": plain.step(TOKEN, codes),
                "transformers, float32": theirs.step(context),
            }
            if openvino:
                candidates["OpenVINO u8, float weights"] = openvino.step(TOKEN, context)
            yield f"context {context}", candidates


def _compiled(checkpoint: Checkpoint, out: Path, threads: int) -> Session:
    program = capture(checkpoint, torch.float32)
    quantize(program)
    emit(program, checkpoint, out, "gqa")
    return load(out, threads)


def _step(session: Session, codes: list[Tensor]) -> Callable[[], object]:
    given = step_inputs(codes[0].shape[2])
    caches = {port.name: x for port, x in zip(session.caches, codes, strict=True)}
    session.run({**given, **caches})
    return lambda: session.run(given)


def _codes(session: Session, context: int) -> list[Tensor]:
    """Caches of one sequence, full of random codes."""
    random, sizes = torch.Generator().manual_seed(0), {"B": 1, "L": context}
    shapes = [[sizes[d] if isinstance(d, str) else d for d in p.shape] for p in session.caches]
    return [torch.randint(-128, 128, shape, generator=random, dtype=torch.int8) for shape in shapes]


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

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = model.eval()

    def step(self, context: int) -> Callable[[], object]:
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
