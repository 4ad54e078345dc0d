"""Run an ONNX directory on a CPU, with ONNX Runtime.

    session = load(out)
    session.allocate(blocks=64, block_size=16)
    logits, *caches = session.run({"input_ids": ..., ...})

Caches that `run` is not given are those that the step before it gave.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from torch import Tensor

from kvc8.ir.errors import TargetError
from kvc8.ir.model_files import place, read_json, shown
from kvc8.ir.types import DTYPES


@dataclass(frozen=True)
class Port:
    """An input, a cache or an output: its name, dtype and shape, with sizes by name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass
class Session:
    """A loaded model and the caches as they now are."""

    inputs: tuple[Port, ...]
    caches: tuple[Port, ...]
    outputs: tuple[Port, ...]
    _session: ort.InferenceSession = field(repr=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def allocate(self, blocks: int, block_size: int) -> None:
        """Start with empty caches of `blocks` blocks; a dense cache has one for each sequence."""
        sizes = {"N": blocks, "S": block_size, "B": blocks, "L": block_size}
        for port in self.caches:
            shape = [sizes[d] if isinstance(d, str) else d for d in port.shape]
            self._kept[port.name] = torch.zeros(shape, dtype=port.dtype)

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The logits and each cache as it then is.

        `inputs` has each input of a step by name, and may have caches; others are ignored, so that
        what `ir.run.run` takes can be given here. Raises TargetError where one is missing or is
        not of its dtype or shape.
        """
        given = {**self._kept, **inputs}
        feeds = {port.name: _feed(port, given) for port in (*self.inputs, *self.caches)}
        names = [port.name for port in self.outputs]
        results = [_tensor(x) for x in self._session.run_with_ort_values(names, feeds)]
        caches = results[len(results) - len(self.caches) :]
        self._kept = {port.name: x for port, x in zip(self.caches, caches, strict=True)}
        return results


def load(out: Path, threads: int = 0) -> Session:
    """Load what `emit` wrote; `threads` 0 is one a core. Raises TargetError at anything else."""
    manifest = read_json(out / "manifest.json")
    if manifest.get("format") != "kvc8-onnx" or manifest.get("version") != 1:
        raise TargetError(f"{place(out)}: is no ONNX model of this kvc8; compile it again")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Without VNNI, int8 products are summed in pairs in int16, which saturates; this keeps exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(
            str(out / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    except ort_state.NotImplemented as error:  # bfloat16: most ops have no kernel for it
        what = f"{place(out)}: ONNX Runtime cannot compute this on a CPU ({shown(error)})"
        raise TargetError(f"{what}; compile it in float32") from error
    except (ort_state.Fail, ort_state.InvalidProtobuf, ort_state.NoSuchFile) as error:
        what = f"{place(out)}: cannot be loaded ({shown(error)})"
        raise TargetError(f"{what}; compile it again") from error
    inputs, caches, outputs = (_ports(manifest[part]) for part in ("inputs", "caches", "outputs"))
    return Session(inputs, caches, outputs, session)


def _ports(entries: object) -> tuple[Port, ...]:
    assert isinstance(entries, Iterable)
    return tuple(Port(e["name"], DTYPES[e["dtype"]], tuple(e["shape"])) for e in entries)


def _feed(port: Port, given: Mapping[str, Tensor]) -> ort.OrtValue:
    if port.name not in given:
        raise TargetError(f"{port.name}: has no value; give one, or allocate the caches")
    tensor = given[port.name]
    fits = len(port.shape) == tensor.dim() and all(
        isinstance(d, str) or d == n for d, n in zip(port.shape, tensor.shape, strict=True)
    )
    if tensor.dtype is not port.dtype or not fits:
        wants = f"{port.dtype} {list(port.shape)}"
        what = f"{port.name}: is {tensor.dtype} {list(tensor.shape)} and the model takes {wants}"
        raise TargetError(f"{what}; convert it")
    return ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def _tensor(value: ort.OrtValue) -> Tensor:
    return torch.utils.dlpack.from_dlpack(value)  # shares the memory
