"""From a model directory to an artifact or an ONNX model: what kvc8-compile and kvc8.compile do."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from kvc8.backends.npu import artifact, legality
from kvc8.backends.runtime.kv_layout import KVLayout, kv_layout
from kvc8.ir.capture.build import config_dtype
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelWarning
from kvc8.ir.expression import Read
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.options import NAMES, Options
from kvc8.passes.rewrite import Remark
from kvc8.tools.driver.request import Target, check_request

Remarks = list[tuple[str, Remark]]  # each with the name of its pass
Check = Callable[[Checkpoint, Program], None]


@dataclass(frozen=True)
class Compiled:
    """What a compile made: the directory, and the programs that it was written from."""

    out: Path
    target: Target
    options: Options
    quantized: Program
    phases: Mapping[str, Program] = field(default_factory=dict)  # LOWERED; empty where not lowered
    remarks: Remarks = field(default_factory=list)

    @property
    def layout(self) -> KVLayout:
        """The KV cache, with its bytes a token."""
        return kv_layout(self.quantized)

    def unfused(self) -> Mapping[str, Program]:
        """The LOWERED programs as `fuse="off"` leaves them, to compare with."""
        return pipeline.lower_for_npu(self.quantized, replace(self.options, fuse="off"))[0]


def compile_model(
    checkpoint: Checkpoint,
    out: Path,
    target: Target,
    options: Options = pipeline.DEFAULT,
    *,
    check: Check | None = None,
    watchers: Sequence[pipeline.See] = (),
) -> Compiled:
    """Compile a model into the directory `out`, which is written whole or not at all.

    `check` sees the checkpoint and the CAPTURED program before a pass runs, and may raise;
    `watchers` see each pass that ran. Raises TargetError where `out` exists or the target cannot
    run the program, ModelError or IRError where the model cannot be captured or rewritten.
    """
    check_request(out, target, options)
    for warning in (*checkpoint.warnings, *unsupported(checkpoint)):
        warnings.warn(warning, stacklevel=2)
    program = capture(checkpoint, target.computes_in)
    if check:
        check(checkpoint, program)
    see = _all(watchers) if watchers else None
    remarks = quantize(program, options, see, checkpoint.read)
    phases: dict[str, Program] = {}
    if target.lowered:
        phases, more = pipeline.lower_for_npu(program, options, see)
        remarks += more
    write(out, checkpoint, target, options, program, phases)
    return Compiled(out, target, options, program, phases, remarks)


def quantize(
    program: Program,
    options: Options = pipeline.DEFAULT,
    see: pipeline.See | None = None,
    read: Read | None = None,
) -> Remarks:
    """Bring a captured program to QUANTIZED; with `read`, of stored tensors, remarks say more."""
    passes = pipeline.quantize_passes(options)
    passes = pipeline.reading(passes, read) if read else passes
    return pipeline.run(program, passes, see)


def unsupported(checkpoint: Checkpoint) -> list[ModelWarning]:
    """What the vendor does not support and kvc8 compiles all the same."""
    if not checkpoint.kv or config_dtype(checkpoint) is not torch.bfloat16:
        return []
    what = "a bfloat16 model with an int8 KV cache, which the vendor does not support"
    do = "compare its answers, or convert it to float16"
    return [ModelWarning("config.json", what, do)]


def _all(watchers: Sequence[pipeline.See]) -> pipeline.See:
    def see(ran: pipeline.Ran) -> None:
        for watcher in watchers:
            watcher(ran)

    return see


def write(
    out: Path,
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    program: Program,
    phases: Mapping[str, Program],
) -> None:
    """Write what a target wants of a QUANTIZED program, or of its LOWERED `phases`.

    Raises TargetError where a device would refuse a call of them, before anything is written.
    """
    if target.kind == "npu":
        beyond = options.nz_heads == "any"
        for phase in phases.values():
            legality.check(phase, target.soc, target.block_size, beyond)
        notes = {name: str(getattr(options, name)) for name in NAMES}
        compiled_for = artifact.CompiledFor(target.soc, target.block_size, notes, options.ranks)
        artifact.write(out, checkpoint, phases, compiled_for)
        return
    from kvc8.backends.onnx import emitter, lowered  # onnx takes a second to import

    if phases:
        lowered.emit_lowered(phases, checkpoint, out)
    else:
        flavor: Literal["standard", "gqa"] = "gqa" if target.flavor == "gqa" else "standard"
        emitter.emit(program, checkpoint, out, flavor)
