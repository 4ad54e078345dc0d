"""What is asked for, and what of it is refused at once: before torch is imported, which takes
seconds, and before a model is built. What only a captured model shows is refused later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvc8.backends.socs import rows_of
from kvc8.ir.capture.known import check_model_type
from kvc8.ir.checkpoint.layouts import fact, kv_widths
from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, open_checkpoint
from kvc8.ir.errors import ModelError, TargetError
from kvc8.passes.matchers.heads import check_ranks
from kvc8.passes.options import Options

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Target:
    """What a model is compiled for. Raises TargetError where the parts do not go together."""

    kind: Literal["npu", "onnx"]
    soc: str = "ascend910b"  # Atlas 800I A2
    block_size: int = 128  # tokens that a block of the cache holds
    flavor: Literal["standard", "gqa", "lowered"] | None = None  # of ONNX; None is standard
    # The name of the dtype to compute in; None: config.json's, or float32 for a CPU.
    dtype: str | None = None

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
        import torch

        for_cpu = None if self.lowered else "float32"  # which a CPU computes fastest
        name = self.dtype or for_cpu
        found: torch.dtype | None = getattr(torch, name) if name else None
        return found


def open_known(directory: Path, calibrated: Calibrated | None = None) -> Checkpoint:
    """Open a model directory whose model_type transformers knows."""
    checkpoint = open_calibrated(directory, calibrated)
    check_model_type(checkpoint.config)
    return checkpoint


def open_calibrated(directory: Path, calibrated: Calibrated | None = None) -> Checkpoint:
    """Open a model directory, of which someone may know better where its K was measured."""
    checkpoint = open_checkpoint(directory)
    if calibrated and not checkpoint.kv:
        what = "holds no KV scales for --kv-calibrated to speak of"
        raise ModelError(str(directory), what, "leave it out, or quantize with kvc8-quantize")
    return replace(checkpoint, kv_calibrated=calibrated) if calibrated else checkpoint


def check_request(out: Path, target: Target, options: Options) -> None:
    """Raise TargetError where `out` exists, no limits of the soc are known, or options do not go
    with the target.
    """
    if out.exists():
        raise TargetError(str(out), "exists already", "choose another directory or remove it")
    if target.kind == "npu":
        rows_of(target.soc)  # says so where there are none
    if options.kv_format == "nz" and target.kind != "npu":
        raise TargetError(
            "--kv-format", "nz is of --target npu", "leave it out, or compile for npu"
        )
    if options.nz_heads == "any" and options.kv_format != "nz":
        raise TargetError("--nz-heads", "any is of --kv-format nz", "leave it out, or ask for nz")
    if options.ranks > 1 and target.kind != "npu":
        raise TargetError("--tp", "is of --target npu", "leave it out, or compile for npu")


def check_heads(checkpoint: Checkpoint, ranks: int) -> None:
    """Raise TargetError where the heads of config.json divide among so many ranks in no layer.

    Nothing is said where it does not give their numbers plainly; the pass that divides them asks
    the model itself.
    """
    if ranks == 1 or not checkpoint.kv:
        return
    text = checkpoint.config.get("text_config")
    config = text if isinstance(text, dict) else checkpoint.config
    query, hidden = (fact(config, name) for name in ("num_attention_heads", "hidden_size"))
    size = config.get("head_dim")
    if isinstance(query, int) and isinstance(hidden, int) and size is None:
        size = hidden // query
    if isinstance(query, int) and isinstance(size, int):
        where = place(checkpoint.path, "config.json")
        check_ranks([(query, width // size) for width in kv_widths(config, where)], ranks)
