"""kvc8-verify: one prompt through every form of a compiled model, side by side.

    kvc8-verify DIR

The reference is the QUANTIZED program in float32 on a CPU. Beside it run: the captured program
(a float cache), the NPU programs emulated in float32 and in the model's own dtype, and ONNX
Runtime in float32. All are fed the reference's tokens: a prompt, then greedy decode steps.

Codes are compared at every slot that was written. "same inputs" counts the codes that differ
although the float rows they come from are equal bit for bit; there must be none, and while all
codes agree the float32 forms must agree with the reference within 1e-3 in every logit.

Beyond that no form can promise agreement. Two correct programs sum in another order, which moves a
value by one part in 10^7; where that crosses the middle between two codes the code changes by one,
and each quantizer after it amplifies the step, until the two differ as much as quantization itself
makes them differ. "first" is the layer where that begins; the KL says what it comes to.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import Node

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu import runtime
from kvc8.backends.onnx import emitter, runner
from kvc8.ir import npu, ops
from kvc8.ir.capture import capture, config_dtype
from kvc8.ir.checkpoint import Checkpoint, open_checkpoint
from kvc8.ir.program import Program, argument, is_call
from kvc8.ir.recipe import make
from kvc8.ir.types import dtype_name
from kvc8.passes import pipeline
from kvc8.tools.command import entry
from kvc8.tools.compile import quantize
from kvc8.tools.tokenize import read_tokenizer

TEXT = """A paged cache keeps the keys and values of each sequence in blocks of a fixed size, and a
table says which blocks belong to which sequence. When a sequence grows past the end of its last
block, the table gets another one from a list of free blocks; when it ends, its blocks go back to
that list. No block has to lie beside another, so memory is never cut into pieces that are too small
to use. What a block holds may be stored in fewer bits than the model computes in. Eight bits a
value halve what sixteen take, and twice as many tokens fit beside the weights, or twice as many
sequences share one card. The price is a rounding of every key and every value to one of 256 steps
of its channel. How much that costs depends on how well the steps fit what the channel holds: a
channel whose largest value was measured before a rotation, and stored after it, is clipped, and the
answers suffer. It is therefore worth asking of every number in a compiled program where it came
from, what it may differ by, and who has checked that it does not differ by more than that."""
BLOCK = 128
LOGITS = 1e-3


@dataclass
class Run:
    """What one form of the model gave for the prompt and the decode steps."""

    logits: list[Tensor] = field(default_factory=list)  # of each step, [rows, vocabulary]
    caches: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)  # what was quantized, by cache


@dataclass(frozen=True)
class Row:
    """One line of the table: how a form differs from the reference."""

    form: str
    logits: float  # largest absolute difference
    kl: float  # mean Kullback-Leibler divergence of the next token, in nats
    greedy: int  # steps whose greedy token agrees
    steps: int
    codes: int | None = None  # int8 codes that differ
    of: int | None = None
    most: int | None = None  # the largest difference between two codes
    first: int | None = None  # the first layer with a code that differs; None where none does
    same_inputs: int | None = None  # codes that differ though their inputs do not


Step = Callable[[Mapping[str, object], Run], Tensor]


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-verify."""
    found = argparse.ArgumentParser(prog="kvc8-verify", description=__doc__.splitlines()[0])
    found.add_argument("directory", type=Path, help="the model, with scales for its KV cache")
    found.add_argument("--text", type=Path, help="a file whose text is the prompt")
    found.add_argument("--tokens", type=int, default=200, help="of the prompt")
    found.add_argument("--steps", type=int, default=32, help="decode steps after it")
    found.add_argument("--kv-scales", choices=("repair", "as-is"), default="repair")
    found.add_argument("--json", action="store_true", help="print the table as JSON")
    return found


def work(args: argparse.Namespace) -> int:
    """Run all forms and compare; gives 1 where one breaks a promise."""
    checkpoint = open_checkpoint(args.directory)
    text = args.text.read_text(encoding="utf-8") if args.text else TEXT
    prompt = read_tokenizer(args.directory).encode(text)[: args.tokens]
    captured = capture(checkpoint, torch.float32)
    reference = captured.copy()
    quantize(reference, args.kv_scales)
    tokens, base = _reference(reference, checkpoint, prompt, args.steps)
    rows = []
    for form, made in _forms(args, checkpoint, captured, reference, prompt, tokens):
        rows.append(_compare(form, made, base, reference))
    _print(rows, args.json, len(prompt))
    broken = [problem for row in rows for problem in _broken(row)]
    for problem in broken:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if broken else 0


def _forms(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    captured: Program,
    reference: Program,
    prompt: list[int],
    tokens: list[int],
) -> list[tuple[str, Run]]:
    own = capture(checkpoint, config_dtype(checkpoint))
    quantize(own, args.kv_scales)
    same, device = (
        _model(pipeline.lower_for_npu(p, kv)[0], checkpoint, prompt, tokens)
        for p, kv in ((reference, "int8"), (own, "float"))
    )
    float_cache = _model({"prefill": captured, "decode": captured}, checkpoint, prompt, tokens)
    dtype = dtype_name(config_dtype(checkpoint))
    return [
        ("float cache f32", _replay(float_cache, prompt, tokens)),
        ("NPU emulated f32", _replay(same, prompt, tokens)),
        ("ONNX Runtime f32", _onnx(reference, checkpoint, prompt, tokens)),
        (f"NPU emulated {dtype}", _replay(device, prompt, tokens)),
    ]


def _table(count: int) -> list[int]:
    """Blocks for `count` tokens, out of order, so that an order taken for granted shows."""
    return list(range(-(-count // BLOCK)))[::-1]


def _model(
    programs: Mapping[str, Program], checkpoint: Checkpoint, prompt: list[int], tokens: list[int]
) -> runtime.Model:
    blocks = len(_table(len(prompt) + len(tokens)))
    return runtime.load(
        programs, lambda r: make(r, checkpoint.read), blocks=blocks, block_size=BLOCK
    )


def _reference(
    program: Program, checkpoint: Checkpoint, prompt: list[int], steps: int
) -> tuple[list[int], Run]:
    """Generate greedily; gives the tokens and what the reference computed."""
    model = _model({"prefill": program, "decode": program}, checkpoint, prompt, [0] * steps)
    table, base, tokens = _table(len(prompt) + steps), Run(), list[int]()
    base.logits.append(model.prefill([prompt], [table], observe=_watch(base)))
    for step in range(steps):
        tokens.append(int(base.logits[-1][-1].argmax()))
        length = len(prompt) + step + 1
        base.logits.append(model.decode([tokens[-1]], [length], [table], observe=_watch(base)))
    base.caches = dict(model.caches)
    return tokens, base


def _replay(model: runtime.Model, prompt: list[int], tokens: list[int]) -> Run:
    made, table = Run(), _table(len(prompt) + len(tokens))
    made.logits.append(model.prefill([prompt], [table], observe=_watch(made)))
    for step, token in enumerate(tokens):
        length = len(prompt) + step + 1
        made.logits.append(model.decode([token], [length], [table], observe=_watch(made)))
    made.caches = dict(model.caches)
    return made


def _onnx(program: Program, checkpoint: Checkpoint, prompt: list[int], tokens: list[int]) -> Run:
    """The same steps in ONNX Runtime, out of a model written for the occasion.

    What it quantizes cannot be watched from outside, so it is made an output.
    """
    made, table = Run(), _table(len(prompt) + len(tokens))
    probe, watched = _probe(program)
    empty = _model({"prefill": program, "decode": program}, checkpoint, prompt, tokens)
    caches: dict[str, Tensor] = dict(empty.caches)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "onnx"
        emitter.emit(probe, checkpoint, out)
        session = runner.load(out)
        names = {node.name for node in program.inputs()}
        for start, new in [(0, prompt), *((len(prompt) + i, [t]) for i, t in enumerate(tokens))]:
            given = runtime.inputs([runtime.Rows(new, start, table)], BLOCK, torch.device("cpu"))
            step = {k: v for k, v in given.items() if k in names and isinstance(v, Tensor)}
            logits, *rest = session.run({**step, **caches})
            seen, after = rest[: len(watched)], rest[len(watched) :]
            for name, rows in zip(watched, seen, strict=True):
                made.rows.setdefault(name, []).append(rows.flatten(1))
            caches = dict(zip(caches, after, strict=True))
            made.logits.append(logits)
    made.caches = caches
    return made


def _probe(program: Program) -> tuple[Program, list[str]]:
    """A program that gives what it quantizes too, and the caches that this goes to."""
    probe = program.copy()
    writes = [w for w in probe.calls(ops.cache_write) if is_call(w.args[1], ops.quantize)]
    rows = [_float_rows(argument(write, 1)) for write in writes]
    [output] = probe.graph.find_nodes(op="output")
    logits, *caches = output.args[0]
    output.args = ([logits, *rows, *caches],)
    return probe, [argument(write, 0).name for write in writes]


def _watch(run: Run) -> Callable[[Node, object], None]:
    """Note the float rows that go into each cache."""
    seen: dict[Node, object] = {}

    def observe(node: Node, value: object) -> None:
        seen[node] = value
        for codes, cache in _written(node):
            rows = seen.get(_float_rows(codes))
            if isinstance(rows, Tensor):
                run.rows.setdefault(cache.name, []).append(rows.flatten(1))

    return observe


def _written(node: Node) -> list[tuple[Node, Node]]:
    """The rows and the cache of each write that a node makes."""
    if is_call(node, ops.cache_write):
        return [(argument(node, 1), argument(node, 0))]
    if is_call(node, npu.npu_scatter_pa_kv_cache):
        return [(argument(node, 0), argument(node, 2)), (argument(node, 1), argument(node, 3))]
    return []


def _float_rows(codes: Node) -> Node:
    """What was quantized into codes."""
    node = codes
    while is_call(node, torch.ops.aten.reshape.default):
        node = argument(node, 0)
    return argument(node, 0) if is_call(node, ops.quantize, npu.npu_quantize) else codes


def _compare(form: str, made: Run, base: Run, program: Program) -> Row:
    pairs = list(zip(made.logits, base.logits, strict=True))
    gap = max(float((a.float() - b).abs().max()) for a, b in pairs)
    greedy = sum(bool(a[-1].argmax() == b[-1].argmax()) for a, b in pairs)
    row = {"form": form, "logits": gap, "kl": _kl(pairs), "greedy": greedy, "steps": len(pairs)}
    differ, of, most, same = 0, 0, 0, 0
    first: int | None = None
    for i, cache in enumerate(program.caches()):
        a, b = made.caches[cache.name], base.caches[cache.name]
        if a.dtype is not torch.int8:
            return Row(**row)  # type: ignore[arg-type]
        gaps = (a.int() - b.int()).abs()
        differ, most = differ + int((gaps > 0).sum()), max(most, int(gaps.max()))
        first = i // 2 if first is None and gaps.any() else first
        of += sum(rows.numel() for rows in base.rows[cache.name])
        same += _differ_on_same(made, base, cache.name, gaps)
    known = bool(made.rows)
    known_same = same if known else None
    return Row(**row, codes=differ, of=of, most=most, first=first, same_inputs=known_same)  # type: ignore[arg-type]


def _differ_on_same(made: Run, base: Run, cache: str, gaps: Tensor) -> int:
    """Codes that differ where the float rows they come from are equal bit for bit."""
    if cache not in made.rows:
        return 0
    a, b = (torch.cat(run.rows[cache]).float() for run in (made, base))
    table = _table(len(a))
    slots = torch.tensor([table[p // BLOCK] * BLOCK + p % BLOCK for p in range(len(a))])
    written = gaps.flatten(0, 1)[slots].flatten(1)
    return int(((a == b) & (written > 0)).sum())


def _kl(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean over the steps of KL(reference || form) of the last row's next token."""
    made, base = (
        torch.stack([pair[i][-1].float() for pair in pairs]).log_softmax(-1) for i in (0, 1)
    )
    return float((base.exp() * (base - made)).sum(-1).mean())


def _broken(row: Row) -> list[str]:
    """What a form promised and did not keep."""
    found = []
    if row.same_inputs:
        what = f"{row.same_inputs} int8 codes differ though their inputs are equal"
        found.append(f"{row.form}: {what}; report it with the output of --json")
    if row.codes == 0 and row.logits > LOGITS and row.form.endswith("f32"):
        what = f"all codes agree and logits differ by {row.logits:.2g}, more than {LOGITS}"
        found.append(f"{row.form}: {what}; compile with --dump and compare the programs")
    return found


def _print(rows: list[Row], as_json: bool, prompt: int) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    steps = rows[0].steps - 1
    title = f"against the reference program in float32: {prompt} tokens and {steps} decode steps"
    table = Table(title=title, title_justify="left")
    for name in ("", "logits, max", "KL, mean", "greedy", "codes differ", "by at most", "first"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_column("same inputs", justify="right")
    for row in rows:
        codes = "float" if row.codes is None or not row.of else f"{row.codes / row.of:.2%}"
        most, same = ("" if x is None else str(x) for x in (row.most, row.same_inputs))
        first = "" if row.codes is None else "-" if row.first is None else f"layer {row.first}"
        greedy = f"{row.greedy}/{row.steps}"
        table.add_row(
            row.form, f"{row.logits:.2g}", f"{row.kl:.2g}", greedy, codes, most, first, same
        )
    Console(width=110).print(table)
    print("NPU rows are emulated as the ops are documented; they were not verified on a device")


def main() -> int:
    """Run kvc8-verify."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
