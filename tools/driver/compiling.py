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
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError, ModelWarning, TargetError
from kvc8.ir.expression import Read
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.options import NAMES, Options
from kvc8.passes.rewrite import Remark

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Remarks = list[tuple[str, Remark]]  # each with the name of its pass
Check = Callable[[Checkpoint, Program], None]


@dataclass(frozen=True)
class Target:
    """What a model is compiled for. Raises TargetError where the parts do not go together."""

    kind: Literal["npu", "onnx"]
    soc: str = "ascend910b"  # Atlas 800I A2
    block_size: int = 128  # tokens that a block of the cache holds
    flavor: Literal["standard", "gqa", "lowered"] | None = None  # of ONNX; None is standard
    dtype: torch.dtype | None = None  # to compute in; None: config.json's, or float32 for a CPU

    def __post_init__(self) -> None:
        if self.flavor and self.kind != "onnx":
            raise TargetError(
                "--flavor", "is of --target onnx", "leave it out, or compile for onnx"
            )

    @property
    def lowered(self) -> bool:
        """Whether its programs are LOWERED, and not the QUANTIZED one."""
        return self.kind == "npu" or self.flavor == "lowered"

    @property
    def computes_in(self) -> torch.dtype | None:
        """The dtype to capture in; None where config.json decides."""
        for_cpu = None if self.lowered else torch.float32  # which a CPU computes fastest
        return self.dtype or for_cpu


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
    _write(out, checkpoint, target, options, program, phases)
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


def open_calibrated(directory: Path, calibrated: Calibrated | None = None) -> Checkpoint:
    """Open a model directory, of which someone may know better where its K was measured."""
    checkpoint = open_checkpoint(directory)
    if calibrated and not checkpoint.kv:
        what = "holds no KV scales for --kv-calibrated to speak of"
        raise ModelError(str(directory), what, "leave it out, or quantize with kvc8-quantize")
    return replace(checkpoint, kv_calibrated=calibrated) if calibrated else checkpoint


def unsupported(checkpoint: Checkpoint) -> list[ModelWarning]:
    """What the vendor does not support and kvc8 compiles all the same."""
    if not checkpoint.kv or config_dtype(checkpoint) is not torch.bfloat16:
        return []
    what = "a bfloat16 model with an int8 KV cache, which the vendor does not support"
    do = "compare its answers, or convert it to float16"
    return [ModelWarning("config.json", what, do)]


def check_request(out: Path, target: Target, options: Options) -> None:
    """Raise TargetError where `out` exists, or options do not go with the target."""
    if out.exists():
        raise TargetError(str(out), "exists already", "choose another directory or remove it")
    if options.kv_format == "nz" and target.kind != "npu":
        raise TargetError(
            "--kv-format", "nz is of --target npu", "leave it out, or compile for npu"
        )
    if options.nz_heads == "any" and options.kv_format != "nz":
        raise TargetError("--nz-heads", "any is of --kv-format nz", "leave it out, or ask for nz")
    if options.ranks > 1 and target.kind != "npu":
        raise TargetError("--tp", "is of --target npu", "leave it out, or compile for npu")


def _all(watchers: Sequence[pipeline.See]) -> pipeline.See:
    def see(ran: pipeline.Ran) -> None:
        for watcher in watchers:
            watcher(ran)

    return see


def _write(
    out: Path,
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    program: Program,
    phases: Mapping[str, Program],
) -> None:
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
