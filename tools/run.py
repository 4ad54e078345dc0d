"""kvc8-run: generate text with a compiled model, on an NPU or emulated on a CPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvc8.ir.checkpoint.model_files import file_names, place
from kvc8.ir.errors import TargetError
from kvc8.tools.command import entry
from kvc8.tools.driver.ranks import Ranks, joined, local_device

if TYPE_CHECKING:  # these take seconds to import, and a mistyped command should not wait for it
    import torch

    from kvc8.backends.npu.dumps import ValueDump
    from kvc8.backends.runtime.generate import Generation, Statistics, StepModel
    from kvc8.backends.runtime.scheduler import Sequence as Running
    from kvc8.tools.driver.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate text as the command line says; gives the exit status."""
    return entry(_parser(), run, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvc8-run", description=(__doc__ or "").partition(": ")[2]
    )
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT", help="what kvc8-compile wrote, for npu or onnx")
    add("--prompt", action="append", required=True, help="may be given several times")
    add("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")
    add("--temperature", type=float, default=0.0, help="0, the default: the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample the likeliest, up to P")
    add("--seed", type=int, default=0, help="of the sampling; default: 0")
    add("--device", choices=("cpu", "npu"), default="cpu", help="default: cpu, emulated")
    add("--graph", action="store_true", help="with --device npu: record decode steps, replay them")
    add("--dump", type=Path, metavar="FILE", help="write each node's values, for kvc8-verify")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="send the prompt as a message; default: where the model has a chat template",
    )
    add("--blocks", type=_positive, metavar="N", help="blocks of the cache; default: enough")
    add("--threads", type=_positive, default=0, metavar="N", help="of ONNX Runtime; default: cores")
    add("--chunk", type=_positive, metavar="N", help="take prompts N tokens at a time")
    add("--share-prefix", action="store_true", help="prompts that begin alike share its blocks")
    add("--json", action="store_true", help="print one JSON object at the end and nothing else")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def run(given: argparse.Namespace) -> int:
    """Load, generate and print, as the only rank or as one of several."""
    _check_there(given.artifact)
    device = _device(given)  # before anything that declares the NPU's ops
    with joined(device) as ranks:
        return _run(given, device, ranks)


def _check_there(path: Path) -> None:
    """Refuse at once what is no compiled model at all."""
    if "manifest.json" not in file_names(path):
        do = "name what kvc8-compile wrote for npu"
        raise TargetError(place(path), "has no manifest.json", do)


def _run(given: argparse.Namespace, device: "torch.device", ranks: Ranks) -> int:
    from kvc8.backends.runtime.generate import generate
    from kvc8.backends.runtime.ranks import agreed
    from kvc8.backends.runtime.sampling import Sampling
    from kvc8.tools.driver.loading import check_lengths, open_compiled

    sampling = Sampling(given.temperature, given.top_p, given.seed)
    loaded = open_compiled(given.artifact, device, given.threads, ranks)
    prompts = loaded.encode(given.prompt, given.chat)
    check_lengths(loaded.config, prompts, given.max_new_tokens)
    printer = _Printer(loaded.tokenizer, len(prompts), quiet=given.json or not ranks.leads)
    model = loaded.allocate([len(p) + given.max_new_tokens for p in prompts], given.blocks)
    if given.graph:
        _record_graphs(model)
    recording = _recording(given, model, ranks) if given.dump else None
    generation = generate(
        model,
        prompts,
        most=given.max_new_tokens,
        stops=loaded.tokenizer.stops,
        sampling=sampling,
        on_token=printer.token,
        chunk=given.chunk,
        share=given.share_prefix,
        agree=partial(agreed, device=device) if ranks.size > 1 else None,
    )
    if not ranks.leads:
        return 0
    _report(given, generation, printer.texts(), loaded.note)
    if recording:
        recording.write(given.dump)
    return 0


def _record_graphs(model: "StepModel") -> None:
    """Record decode steps on the device, and replay them."""
    import torch

    from kvc8.backends.npu.graphs import Recorder
    from kvc8.backends.runtime.model import Model

    assert isinstance(model, Model)  # --graph is of --device npu, where no ONNX model runs
    blocks = next(iter(model.caches.values())).shape[0]
    model.runner = Recorder(torch.get_device_module("npu"), blocks)


def _recording(given: argparse.Namespace, model: "StepModel", ranks: Ranks) -> "ValueDump":
    """What keeps the values of the first step of each phase."""
    from kvc8.backends.npu.dumps import ValueDump
    from kvc8.backends.runtime.model import Model

    if ranks.size > 1:
        raise TargetError("--dump", "is of one rank", "dump what was compiled without --tp")
    if not isinstance(model, Model) or given.graph:
        what = "keeps the values of an NPU program's nodes, run one by one"
        raise TargetError("--dump", what, "leave out --graph, and name what was compiled for npu")
    if given.dump.exists():
        raise TargetError(str(given.dump), "exists already", "choose another file or remove it")
    model.runner = ValueDump(model.programs)
    return model.runner


def _device(given: argparse.Namespace) -> "torch.device":
    if given.graph and given.device != "npu":
        raise TargetError("--graph", "is of --device npu", "leave it out, or run on an NPU")
    if given.device == "npu":
        from kvc8.backends.npu.device import load_torch_npu

        return load_torch_npu(local_device())
    import torch

    return torch.device("cpu")


class _Printer:
    """Prints text as it comes: one sequence live, and the others after it, in order."""

    def __init__(self, tokenizer: "Tokenizer", count: int, quiet: bool) -> None:
        from kvc8.tools.driver.tokenizer import TextStream

        self.streams = [TextStream(tokenizer) for _ in range(count)]
        self.ended = [False] * count
        self.waiting = [""] * count  # text that is not printed yet
        self.live, self.quiet = 0, quiet
        self.label(0)

    def token(self, sequence: "Running", token: int) -> None:
        """Take a token of a sequence."""
        index = sequence.index
        stream = self.streams[index]
        self.waiting[index] += stream.add(token)
        if sequence.finish:
            self.waiting[index] += stream.end()
            self.ended[index] = True
        self.flush()

    def flush(self) -> None:
        while self.live < len(self.streams):
            self.put(self.waiting[self.live])
            self.waiting[self.live] = ""
            if not self.ended[self.live]:
                return
            self.put("\n")
            self.live += 1
            self.label(self.live)

    def label(self, index: int) -> None:
        if 1 < len(self.streams) > index:
            self.put(f"[{index + 1}] ")

    def put(self, text: str) -> None:
        if not self.quiet:
            print(text, end="", flush=True)

    def texts(self) -> list[str]:
        """The whole text of each sequence."""
        return [stream.text for stream in self.streams]


def _report(
    given: argparse.Namespace, generation: "Generation", texts: list[str], note: str
) -> None:
    if given.json:
        print(json.dumps(_as_json(given.prompt, generation, texts) | {"note": note}, indent=1))
    else:
        _print_table(generation.statistics, note)


def _as_json(prompts: list[str], generation: "Generation", texts: list[str]) -> dict[str, object]:
    statistics = generation.statistics
    sequences = [
        {
            "prompt": prompt,
            "prompt_tokens": len(sequence.prompt),
            "text": text,
            "tokens": sequence.generated,
            "finish": sequence.finish,
        }
        for prompt, sequence, text in zip(prompts, generation.sequences, texts, strict=True)
    ]
    rates = {
        "prefill_tokens_per_second": statistics.prefill_rate,
        "decode_tokens_per_second": statistics.decode_rate,
    }
    return {"sequences": sequences, "statistics": asdict(statistics) | rates}


def _print_table(statistics: "Statistics", note: str) -> None:
    """Print what the run cost to stderr, so that stdout holds the text and nothing else."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=note, caption_justify="left", show_header=False)
    rate = "{:,} tokens in {:.2f} s, {:,.1f} a second"
    s = statistics
    if s.found_tokens:
        table.add_row("found in the cache", f"{s.found_tokens:,} tokens of prompts")
    table.add_row("prefill", rate.format(s.prefill_tokens, s.prefill_seconds, s.prefill_rate))
    table.add_row("decode", rate.format(s.decode_tokens, s.decode_seconds, s.decode_rate))
    used = f"{s.cache_bytes_used / 1e6:,.2f} MB used of {s.cache_bytes_allocated / 1e6:,.2f} MB"
    table.add_row("KV cache", used)
    ratio = s.bytes_per_token / s.float16_bytes_per_token
    cost = f"{s.bytes_per_token:,} bytes, {ratio:.0%} of float16's {s.float16_bytes_per_token:,}"
    table.add_row("a token", cost)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    sys.exit(main())
