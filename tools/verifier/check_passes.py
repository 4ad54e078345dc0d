"""Every pass that a compile runs, held to its contract on a recorded prompt."""

from collections.abc import Callable

from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.program import Program
from kvc8.ir.ranks import side_by_side
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.passes.pipeline import Phases
from kvc8.passes.rewrite import Step
from kvc8.tools.verifier.contracts import Checked, RecordedCall, check
from kvc8.tools.verifier.recording import Feed, Parameters, empty, feed, record
from kvc8.tools.verifier.values import Values, by_name
from kvc8.tools.verifier.verdicts import Verdict

PROMPT, CHUNK = 13, 3  # tokens: more than a window of the tests, less than a block


def ignore(checked: Checked) -> None:
    """Watch nothing."""


def check_passes(
    checkpoint: Checkpoint,
    captured: Program,
    options: Options,
    see: Callable[[Checked], None] | None = None,
    npu: bool = True,
) -> list[Verdict]:
    """Run a prompt and a decode step before and after each pass of a compile.

    `captured` stays as it is. Without `npu` the passes stop at QUANTIZED, where ONNX does.
    """
    phases = pipeline.phases(options) if npu else {}
    return check_steps(
        checkpoint,
        captured,
        pipeline.quantize_passes(options),
        phases,
        see or ignore,
        options.ranks,
    )


def check_steps(
    checkpoint: Checkpoint,
    captured: Program,
    quantize: tuple[Step, ...],
    phases: Phases,
    see: Callable[[Checked], None] = ignore,
    ranks: int = 1,
) -> list[Verdict]:
    """The same for any passes: those up to QUANTIZED, and those of each phase after it.

    What phases share is run once, on the inputs of the first of them.
    """
    program, parameters = captured.copy(), Parameters(checkpoint.read)
    prompt, chunk, step = _feeds(checkpoint)
    lineage = {node.name: node.name for node in program.graph.nodes}
    calls = [RecordedCall(prompt), RecordedCall(step)]
    found = check(program, quantize, calls, parameters, see, lineage, ranks)
    if found and found[-1].refused:
        return found
    begun: dict[tuple[Step, ...], tuple[Program, dict[str, str]]] = {(): (program, lineage)}
    whole = side_by_side(program, ranks)
    state = record(whole, parameters, prompt.inputs(whole), empty(whole)).caches
    call = {
        "prefill": RecordedCall(prompt),
        "chunk": RecordedCall(chunk, state),
        "decode": RecordedCall(step, state),
    }
    for phase, (shared, own) in phases.items():
        if shared not in begun:
            begun[shared] = program.copy(), dict(lineage)
            started, line = begun[shared]
            found += check(started, shared, [call[phase]], parameters, see, line, ranks)
            if found[-1].refused:
                return found
        started, line = begun[shared]
        found += check(started.copy(), own, [call[phase]], parameters, see, dict(line), ranks)
        if found[-1].refused:
            return found
    return found


def _feeds(checkpoint: Checkpoint) -> tuple[Feed, Feed, Feed]:
    """A prompt, a chunk of tokens after it, and one token after it."""
    vocabulary = int(str(checkpoint.config["vocab_size"]))
    tokens = [(5 + 37 * i) % vocabulary for i in range(PROMPT + CHUNK)]
    return feed(tokens[:PROMPT]), feed(tokens[PROMPT:], PROMPT), feed(tokens[-1:], PROMPT)


def watch_values(checkpoint: Checkpoint, program: Program) -> Values:
    """What measures values against the CAPTURED program, on the tokens of `check_steps`."""
    parameters = Parameters(checkpoint.read)
    prompt, chunk, step = _feeds(checkpoint)
    first = record(program, parameters, prompt.inputs(program), empty(program))
    captured = {prompt.phase: by_name(first)}
    for each in (chunk, step):
        made = record(program, parameters, each.inputs(program), first.caches)
        captured[each.phase] = by_name(made)
    return Values(captured, first.results[0].name)
