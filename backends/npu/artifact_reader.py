"""Read an artifact back, trusting nothing in it.

Texts are parsed and checked, never executed; no file outside the directory is read; weights are
mapped into memory when the runtime asks for them.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvc8.backends.npu.artifact import (
    CONFIG,
    DERIVED,
    FORMAT,
    INDEX,
    MANIFEST,
    PHASES,
    WEIGHTS,
    check_parameters,
    check_programs,
    expressions_by_name,
    logits_type,
)
from kvc8.backends.runtime.kv_layout import KVLayout, kv_layout
from kvc8.ir.checkpoint.model_files import file_names, model_file, place, positive, read_json, shown
from kvc8.ir.checkpoint.safetensors_files import StoredTensor, TensorFiles, read_header, read_index
from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.expression import Expression, make, stored_names
from kvc8.ir.program import Program, expression_of
from kvc8.ir.ranks import of_rank, side_by_side
from kvc8.ir.shapes import Shapes
from kvc8.ir.text import parse
from kvc8.ir.types import dtype_name
from kvc8.ir.verify import verify

AGAIN = "compile the model again"
# Of what a LOWERED program calls.
NAMESPACES = ("aten", "npu", "atb", "_c10d_functional", "operator")
FILE_OPS = ("from_file",)  # ATen's own way to a file
# What reading a text that is no program may raise, besides IRError.
NOT_A_PROGRAM = (ValueError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class Artifact:
    """A compiled model, opened and checked."""

    path: Path
    model: str  # the name of the directory it was compiled from
    model_type: str
    soc: str
    dtype: str  # that the logits have, "f16"
    block_size: int
    ranks: int  # devices that the model is divided among; the programs are each one's
    notes: Mapping[str, str]
    config: Mapping[str, object]  # the model's own config.json
    programs: Mapping[str, Program]  # by phase: "prefill", "chunk" and "decode"
    tensors: Mapping[str, StoredTensor]  # of the checkpoint, where in use
    derived: Mapping[str, StoredTensor]
    _files: TensorFiles = field(default_factory=TensorFiles, repr=False, compare=False)

    @property
    def layout(self) -> KVLayout:
        """The KV cache of the programs."""
        return kv_layout(self.programs["decode"])

    def of_rank(self, rank: int) -> Mapping[str, Program]:
        """The programs with the parameters of one rank. Raises TargetError where it has none."""
        if not 0 <= rank < self.ranks:
            what = f"rank {rank} of a model compiled for {self.ranks}"
            raise TargetError(place(self.path), what, f"give one from 0 to {self.ranks - 1}")
        return {phase: of_rank(program, rank) for phase, program in self.programs.items()}

    def side_by_side(self) -> Mapping[str, Program]:
        """The programs of all ranks as one each, which run where one device is."""
        return {phase: side_by_side(p, self.ranks) for phase, p in self.programs.items()}

    def make(self, expression: Expression) -> torch.Tensor:
        """Make a parameter, mapping into memory what it is made of."""
        return make(
            expression,
            lambda name: self._files.read(self.tensors[name]),
            lambda name: self._files.read(self.derived[name]),
        )


@dataclass(frozen=True)
class Facts:
    """What the manifest says of an artifact, which is not read beyond that."""

    dtype: str  # that the logits have, "f16"
    block_size: int
    ranks: int


def facts(path: Path) -> Facts:
    """What an engine must agree to. Raises TargetError where there is no whole artifact."""
    file_names(path)  # says so where there is no such directory
    manifest = _manifest(path)
    for name in (*(f"{phase}.py" for phase in PHASES), DERIVED, CONFIG):
        _file(path, name)
    size, ranks = (positive(manifest, n, place(path / MANIFEST)) for n in ("block_size", "ranks"))
    return Facts(_text(path, manifest, "dtype"), size, ranks)


def read(path: Path) -> Artifact:
    """Open the artifact at `path` and check all of it but the values of its tensors.

    Raises TargetError, ModelError (a damaged file) or IRError (a program that is not right).
    """
    file_names(path)  # says so where there is no such directory
    manifest = _manifest(path)
    shapes = Shapes()  # of all phases, which make many of the same calls
    programs = {phase: _program(path, phase, shapes) for phase in PHASES}
    derived = read_header(_file(path, DERIVED))
    artifact = Artifact(
        path=path,
        model=_text(path, manifest, "model"),
        model_type=_text(path, manifest, "model_type"),
        soc=_text(path, manifest, "soc"),
        dtype=_text(path, manifest, "dtype"),
        block_size=positive(manifest, "block_size", place(path / MANIFEST)),
        ranks=positive(manifest, "ranks", place(path / MANIFEST)),
        notes=_notes(path, manifest),
        config=read_json(_file(path, CONFIG)),
        programs=programs,
        tensors=_tensors(path, programs),
        derived=derived,
    )
    _check(artifact, manifest)
    return artifact


def _file(path: Path, name: str) -> Path:
    found = model_file(path, name)
    if found is None:
        raise TargetError(place(path / name), "is not there", AGAIN)
    return found


def _manifest(path: Path) -> Mapping[str, object]:
    if MANIFEST not in file_names(path):
        raise TargetError(place(path), f"has no {MANIFEST}", "name what kvc8-compile wrote for npu")
    manifest = read_json(_file(path, MANIFEST))
    if manifest.get("format") != FORMAT or isinstance(manifest["format"], bool):
        what = f"has format {shown(manifest.get('format'))} and this kvc8 reads {FORMAT}"
        raise TargetError(place(path / MANIFEST), what, AGAIN)
    return manifest


def _text(path: Path, manifest: Mapping[str, object], name: str) -> str:
    value = manifest.get(name)
    if not isinstance(value, str):
        what = f"{name} is {shown(value)} and should be a text"
        raise TargetError(place(path / MANIFEST), what, AGAIN)
    return value


def _notes(path: Path, manifest: Mapping[str, object]) -> Mapping[str, str]:
    notes = manifest.get("notes")
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise TargetError(place(path / MANIFEST), "notes are not an object of texts", AGAIN)
    return notes


def _program(path: Path, phase: str, shapes: Shapes) -> Program:
    file = _file(path, f"{phase}.py")
    where = place(file)
    try:
        text = file.read_text(encoding="utf-8")
        _check_calls(text)
        program = parse(text, shapes)
        verify(program)
    except OSError as error:
        raise TargetError(
            where, f"cannot be read ({error.strerror})", "check its rights"
        ) from error
    except IRError as error:
        raise error.within(where) from error
    except NOT_A_PROGRAM as error:
        why = shown(str(error).partition("\n")[0])
        raise IRError(where, f"is not a program ({why})", AGAIN) from error
    return program


def _check_calls(text: str) -> None:
    """Refuse a text that calls anything but ops, before any name in it is looked up."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return  # parse says where
    for call in _calls(tree):
        space, *rest = ast.unparse(call.func).split(".")
        if (rest and space not in NAMESPACES) or any(name in FILE_OPS for name in rest):
            what = f"calls {shown(ast.unparse(call.func))}, which is no op of an NPU program"
            raise IRError(f"line {call.lineno}", what, AGAIN)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _tensors(path: Path, programs: Mapping[str, Program]) -> Mapping[str, StoredTensor]:
    """The tensors that the weights' index names; each must lie in the artifact's own weights."""
    expressions = [expression_of(node) for p in programs.values() for node in p.parameters()]
    if not any(name for expression in expressions for name in stored_names(expression)):
        return {}
    weights = path / WEIGHTS
    if weights.is_symlink() or not weights.is_dir():
        raise TargetError(place(weights), "is not a directory", AGAIN)
    tensors, _ = read_index(weights, _file(weights, INDEX))  # shards may hold what is not in use
    return tensors


def _check(artifact: Artifact, manifest: Mapping[str, object]) -> None:
    """Check the programs against each other, the weights and the manifest."""
    where = place(artifact.path)
    try:
        check_programs(artifact.programs)
        check_parameters(artifact.programs, artifact.tensors, artifact.derived, artifact.ranks)
    except IRError as error:
        raise error.within(where) from error
    layout = artifact.layout
    expected = {
        "parameters": expressions_by_name(artifact.programs),
        "kv_cache": [cache.as_json() for cache in layout.caches],
        "bytes_per_token": layout.bytes_per_token,
        "float16_bytes_per_token": layout.float16_bytes_per_token,
        "dtype": dtype_name(logits_type(artifact.programs["decode"]).dtype),
    }
    for name, value in expected.items():
        if manifest.get(name) != value:
            what = f"{name} is not what the programs have"
            raise TargetError(place(artifact.path / MANIFEST), what, AGAIN)
