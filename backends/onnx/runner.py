"""Run an ONNX directory on a CPU, with ONNX Runtime.

    session = load(out)
    session.allocate(blocks=64, block_size=16)
    logits, *caches = session.run({"input_ids": ..., ...})

Caches that `run` is not given are those that the step before it gave. They are written in place:
what a step returned of them changes with the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from torch import Tensor

from kvc8.backends.onnx.emitter import VERSION
from kvc8.backends.onnx.mixed import mix, mixed_is_exact
from kvc8.ir.checkpoint.model_files import place, read_json, shown
from kvc8.ir.errors import TargetError
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

    flavor: str
    inputs: tuple[Port, ...]
    caches: tuple[Port, ...]
    outputs: tuple[Port, ...]
    _session: ort.InferenceSession = field(repr=False)
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)  # the caches, by name

    def allocate(self, blocks: int, block_size: int) -> None:
        """Start with empty caches of `blocks` blocks; a dense cache has one for each sequence."""
        sizes = {"N": blocks, "S": block_size, "B": blocks, "L": block_size}
        for port in self.caches:
            shape = [sizes[d] if isinstance(d, str) else d for d in port.shape]
            self.kept[port.name] = torch.zeros(shape, dtype=port.dtype)

    def run(self, inputs: Mapping[str, Tensor], rows: slice | None = None) -> list[Tensor]:
        """The logits and each cache as it then is; with `rows`, over those rows of each cache.

        `inputs` has each input of a step by name, and may have caches; others are ignored, so that
        what `ir.run.run` takes can be given here. Raises TargetError where one is missing or is
        not of its dtype or shape.
        """
        binding = self._session.io_binding()
        watched = self.outputs[: len(self.outputs) - len(self.caches)]
        for port in self.inputs:
            binding.bind_ortvalue_input(port.name, _feed(port, inputs))
        for port in watched:
            binding.bind_output(port.name, "cpu")
        self.kept.update({p.name: inputs[p.name].clone() for p in self.caches if p.name in inputs})
        caches = {name: cache[rows] if rows else cache for name, cache in self.kept.items()}
        for port, new in zip(self.caches, self.outputs[len(watched) :], strict=True):
            cache = _feed(port, caches)
            binding.bind_ortvalue_input(port.name, cache)
            binding.bind_ortvalue_output(new.name, cache)
        self._session.run_with_iobinding(binding)
        results = binding.get_outputs()[: len(watched)]
        return [*map(_tensor, results), *(caches[port.name] for port in self.caches)]


def _manifest(out: Path) -> Mapping[str, object]:
    manifest = read_json(out / "manifest.json")
    if manifest.get("format") != "kvc8-onnx" or manifest.get("version") != VERSION:
        raise TargetError(place(out), "is no ONNX model of this kvc8", "compile it again")
    return manifest


def phases_of(out: Path) -> Mapping[str, object]:
    """What the manifest says of each model by phase; one that has none is "model"."""
    manifest = _manifest(out)
    found = manifest.get("phases", {"model": manifest})
    return found if isinstance(found, dict) else {}


def load(out: Path, threads: int = 0, phase: str = "model") -> Session:
    """Load what `emit` wrote, or a phase of what `emit_lowered` did: "prefill" or "decode".

    `threads` 0 is one a core. Raises TargetError at anything else.
    """
    manifest, described = _manifest(out), phases_of(out).get(phase)
    if not isinstance(described, dict):
        raise TargetError(
            place(out), f"has no phase {shown(phase)}", "choose one of its manifest's"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(out)
    )
    try:
        session = ort.InferenceSession(
            _model(out / f"{phase}.onnx"), options, providers=["CPUExecutionProvider"]
        )
    except ort_state.NotImplemented as error:  # bfloat16: most ops have no kernel for it
        what = f"ONNX Runtime cannot compute this on a CPU ({shown(error)})"
        raise TargetError(place(out), what, "compile it in float32") from error
    except (ort_state.Fail, ort_state.InvalidProtobuf, ort_state.NoSuchFile) as error:
        what = f"cannot be loaded ({shown(error)})"
        raise TargetError(place(out), what, "compile it again") from error
    inputs, caches, outputs = (_ports(out, described, p) for p in ("inputs", "caches", "outputs"))
    return Session(str(manifest.get("flavor")), inputs, caches, outputs, session)


def _model(file: Path) -> str | bytes:
    """The model as it lies there, or with mixed products where those are exact."""
    if not mixed_is_exact():
        return str(file)
    try:
        model = ir.load(file)
    except (OSError, DecodeError):  # ONNX Runtime says what is wrong with it
        return str(file)
    mix(model)
    mixed: bytes = ir.to_proto(model).SerializeToString()
    return mixed


def _ports(out: Path, manifest: Mapping[str, object], part: str) -> tuple[Port, ...]:
    entries = manifest.get(part)
    try:
        assert isinstance(entries, list)
        return tuple(Port(e["name"], DTYPES[e["dtype"]], tuple(e["shape"])) for e in entries)
    except (AssertionError, KeyError, TypeError) as error:
        what = f"{part} are not what kvc8-compile writes"
        raise TargetError(place(out / "manifest.json"), what, "compile it again") from error


def _feed(port: Port, given: Mapping[str, Tensor]) -> ort.OrtValue:
    if port.name not in given:
        raise TargetError(port.name, "has no value", "give one, or allocate the caches")
    tensor = given[port.name]
    fits = len(port.shape) == tensor.dim() and all(
        isinstance(d, str) or d == n for d, n in zip(port.shape, tensor.shape, strict=True)
    )
    if tensor.dtype is not port.dtype or not fits:
        wants = f"{port.dtype} {list(port.shape)}"
        what = f"is {tensor.dtype} {list(tensor.shape)} and the model takes {wants}"
        raise TargetError(port.name, what, "convert it")
    return ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def _tensor(value: ort.OrtValue) -> Tensor:
    return torch.utils.dlpack.from_dlpack(value)  # shares the memory
