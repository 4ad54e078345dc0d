"""Write a compiled model: a directory that holds what the runtime needs and no copy of the weights.

    manifest.json          what was compiled for what; the KV cache; how each parameter is made
    prefill.py ...         the LOWERED programs as text: prefill, chunk and decode
    derived.safetensors    parameters that took arithmetic, each under 1 MB
    weights/               the checkpoint's shards, hard-linked (copied across filesystems), with an
                           index of the tensors in use
    config.json            the model's own, with what a serving engine must know of the artifact
    tokenizer.json ...     generation config and tokenizer, as they are

A hard link is the checkpoint's file itself: whoever writes into that file, rather than putting a
new one in its place, changes the artifact too. kvc8.backends.npu.artifact_reader reads it all back.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save

from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir.checkpoint.model_files import model_file, shown
from kvc8.ir.checkpoint.new_directory import PartialDirectory, new_directory
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Arg, Expression, Read, make, stored_names
from kvc8.ir.program import Program, Stage, expression_of, tensor_type
from kvc8.ir.ranks import bound
from kvc8.ir.text import show
from kvc8.ir.types import TensorType, dtype_name

FORMAT = 4
PHASES = ("prefill", "chunk", "decode")
MANIFEST, DERIVED, WEIGHTS, INDEX = (
    "manifest.json",
    "derived.safetensors",
    "weights",
    "model.safetensors.index.json",
)
CONFIG = "config.json"
ARCHITECTURE = "Kvc8ForCausalLM"  # by which vLLM finds backends/vllm
OF_THE_CHECKPOINT = ("quantization_config", "quantize")  # an engine would look for such weights
COPIED = (
    "generation_config.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
# What an expression may do at load time: it moves values or cuts bits off. The rest is done now,
# for a result of up to LARGEST_DERIVED bytes.
PLAIN = frozenset(
    ("stored", "cast", "reshape", "slice", "concat", "transpose", "expand", "float_bits", "values")
) | {"masked_above", "derived", "shard", "first", "fp19", "stacked", "mixed"}
LARGEST_DERIVED = 1_000_000
# What torch raises when an expression's arguments do not fit.
UNFIT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class CompiledFor:
    """What a model was compiled for, as the manifest has it."""

    soc: str
    block_size: int  # tokens that a block of the cache holds
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ranks: int = 1  # devices that the model is divided among


def write(
    out: Path, checkpoint: Checkpoint, programs: Mapping[str, Program], target: CompiledFor
) -> None:
    """Write the artifact of a checkpoint's LOWERED programs, one for each of PHASES.

    The programs stay as they are. Raises IRError where they are not that, or a parameter is not
    what its expression makes; TargetError where `out` exists or cannot be written: then nothing is.
    """
    check_programs(programs)
    check_parameters(programs, checkpoint.tensors, {}, target.ranks)
    expressions, derived = _derive(programs, checkpoint.read, target.ranks)
    with new_directory(out) as part:
        manifest = _manifest(checkpoint, programs["decode"], expressions, target)
        part.write(MANIFEST, _json(manifest))
        for phase in PHASES:
            part.write(f"{phase}.py", (show(programs[phase], expressions) + "\n").encode())
        part.write(DERIVED, save(derived, metadata={"format": "pt"}))
        _link_weights(part, checkpoint, expressions)
        part.write(CONFIG, _json(_config(checkpoint, programs["decode"])))
        for name in COPIED:
            if source := model_file(checkpoint.path, name):
                part.write(name, source.read_bytes())


def identity(out: Path) -> dict[str, bytes]:
    """What tells an artifact from others, by name; of shards their sizes."""
    files = (MANIFEST, *(f"{phase}.py" for phase in PHASES), DERIVED, CONFIG)
    shards = sorted((out / WEIGHTS).glob("*")) if (out / WEIGHTS).is_dir() else []
    sizes = [f"{shard.name} {shard.stat().st_size}" for shard in shards]
    parts = {name: (out / name).read_bytes() for name in files}
    return parts | {WEIGHTS: "\n".join(sizes).encode()}


@dataclass(frozen=True)
class DiskUse:
    """What an artifact takes on disk, in bytes."""

    weights: int  # the checkpoint's shards
    extra: int  # files that it does not share with others by hard links


def disk_use(out: Path) -> DiskUse:
    """The sizes of an artifact's files, which are not read."""
    files = [path for path in out.rglob("*") if path.is_file()]
    shards = [path for path in files if path.parent.name == WEIGHTS and path.name != INDEX]
    return DiskUse(
        weights=sum(path.stat().st_size for path in shards),
        extra=sum(path.stat().st_size for path in files if path.stat().st_nlink == 1),
    )


def _derive(
    programs: Mapping[str, Program], read: Read, ranks: int
) -> tuple[dict[str, Expression], dict[str, torch.Tensor]]:
    """The expression of each parameter in the artifact, and the tensors to put into `derived`.

    A small parameter that takes arithmetic is read from there; parameters of one expression share
    the result. What is another on each rank lies there for all of them, one after the other.
    """
    expressions: dict[str, Expression] = {}
    derived: dict[str, torch.Tensor] = {}
    made: dict[Expression, str] = {}
    for node in (node for phase in PHASES for node in programs[phase].parameters()):
        expression, type_ = expression_of(node), tensor_type(node)
        if node.name in expressions:
            continue  # it is the same in each phase, which check_programs has seen
        if is_plain(expression) or _nbytes(type_) >= LARGEST_DERIVED:
            expressions[node.name] = expression
            continue
        name, own = made.setdefault(expression, node.name), expression.differs
        if name not in derived:
            each = [make(bound(expression, rank), read) for rank in range(ranks if own else 1)]
            derived[name] = torch.cat(each) if own else each[0].contiguous().clone()
        found = Expression("derived", (name,))
        part = Expression("shard", (found, 0, int(type_.shape[0]))) if own else found
        expressions[node.name] = part
    return expressions, derived


def is_plain(expression: Arg) -> bool:
    """Whether an expression only moves values: such a parameter is made at load time."""
    if isinstance(expression, tuple):
        return all(map(is_plain, expression))
    if not isinstance(expression, Expression):
        return True
    return expression.op in PLAIN and is_plain(expression.args)


def _nbytes(type_: TensorType) -> int:
    return int(math.prod(type_.shape)) * type_.dtype.itemsize


def _link_weights(
    part: PartialDirectory, checkpoint: Checkpoint, expressions: Mapping[str, Expression]
) -> None:
    names = sorted({name for made in expressions.values() for name in stored_names(made)})
    (part.path / WEIGHTS).mkdir()
    for shard in sorted({checkpoint.tensors[name].file for name in names}):
        part.link(f"{WEIGHTS}/{shard.name}", shard)
    index = {"weight_map": {name: checkpoint.tensors[name].file.name for name in names}}
    part.write(f"{WEIGHTS}/{INDEX}", _json(index))


def _manifest(
    checkpoint: Checkpoint,
    decode: Program,
    expressions: Mapping[str, Expression],
    target: CompiledFor,
) -> dict[str, object]:
    layout = kv_layout(decode)
    return {
        "format": FORMAT,
        "kvc8": version("kvc8"),
        "model": checkpoint.path.resolve().name,
        "model_type": str(checkpoint.config.get("model_type", "")),
        "soc": target.soc,
        "dtype": dtype_name(logits_type(decode).dtype),
        "block_size": target.block_size,
        "ranks": target.ranks,
        "bytes_per_token": layout.bytes_per_token,
        "float16_bytes_per_token": layout.float16_bytes_per_token,
        "kv_cache": [cache.as_json() for cache in layout.caches],
        "notes": dict(target.notes),
        "parameters": {name: str(made) for name, made in expressions.items()},
    }


def _config(checkpoint: Checkpoint, decode: Program) -> dict[str, object]:
    """The model's config.json, of an architecture that is the compiled one."""
    kept = {k: v for k, v in checkpoint.config.items() if k not in OF_THE_CHECKPOINT}
    kept.pop("torch_dtype", None)  # the older word for dtype
    dtype = str(logits_type(decode).dtype).removeprefix("torch.")
    return {**kept, "architectures": [ARCHITECTURE], "dtype": dtype}


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def logits_type(program: Program) -> TensorType:
    """The type of what a program gives first."""
    output = next(iter(reversed(program.graph.nodes)))
    results = output.args[0] if output.op == "output" else None
    if not isinstance(results, tuple | list) or not results:
        raise IRError("the program", "has no output", "end it with `return [...]`")
    return tensor_type(results[0])


def expressions_by_name(programs: Mapping[str, Program]) -> dict[str, str]:
    """The expression of each parameter as text. Raises IRError where programs differ in one."""
    found: dict[str, tuple[str, str]] = {}
    for phase, program in programs.items():
        for node in program.parameters():
            text = str(expression_of(node))
            known, first = found.setdefault(node.name, (text, phase))
            if known != text:
                what = f"is made in one way for {first} and in another for {phase}"
                raise IRError(node.name, what, "give the two different names")
    return {name: text for name, (text, _) in found.items()}


def check_programs(programs: Mapping[str, Program]) -> None:
    """Raise IRError unless these are the phases of one model, LOWERED, with the same caches."""
    if set(programs) != set(PHASES):
        names = ", ".join(programs) or "nothing"
        raise IRError("programs", f"are {names}", f"an artifact has {', '.join(PHASES)}")
    for phase, program in programs.items():
        if program.stage is not Stage.LOWERED:
            stage = program.stage.value
            raise IRError(phase, f"is a {stage} program", "run the passes of the npu target")
        logits_type(program)
    for phase, program in programs.items():
        if kv_layout(program) != kv_layout(programs["decode"]):
            what = f"{phase} and decode differ in their caches"
            raise IRError("programs", what, "compile them from one")
    expressions_by_name(programs)


def check_parameters(
    programs: Mapping[str, Program],
    tensors: Mapping[str, StoredTensor],
    derived: Mapping[str, StoredTensor],
    ranks: int = 1,
) -> None:
    """Raise IRError at a parameter that is not of the type that its expression makes.

    A part that the last rank can take, each other rank can.
    """
    made: dict[object, TensorType] = {}  # layers and phases share most of theirs
    for node in (node for program in programs.values() for node in program.parameters()):
        expression = bound(expression_of(node), ranks - 1)
        try:
            kind = _kind(expression, tensors, derived)
            found = made.get(kind) or _made(expression, tensors, derived)
        except IRError as error:
            raise error.within(node.name) from error
        except UNFIT as error:
            why = shown(str(error).strip().partition("\n")[0])
            raise IRError(
                node.name, f"{expression.op} does not fit ({why})", "correct it"
            ) from error
        made[kind] = found
        if found != tensor_type(node):
            what = f"is declared {tensor_type(node)} and its expression makes {found}"
            raise IRError(node.name, what, "declare it so")


def _kind(
    arg: Arg, tensors: Mapping[str, StoredTensor], derived: Mapping[str, StoredTensor]
) -> object:
    """All that an expression's type follows from: it, with types in the place of stored names."""
    if isinstance(arg, tuple):
        return tuple(_kind(item, tensors, derived) for item in arg)
    if not isinstance(arg, Expression):
        return type(arg), arg
    if arg.op in ("stored", "stacked"):
        return arg.op, *(_stored_type(tensors, name) for name in stored_names(arg))
    if arg.op == "derived":
        return arg.op, _stored_type(derived, str(arg.args[0]))
    return arg.op, _kind(arg.args, tensors, derived)


def _stored_type(tensors: Mapping[str, StoredTensor], name: str) -> TensorType:
    if name not in tensors:
        raise IRError(shown(name), "is no stored tensor", "correct the name")
    return TensorType(tensors[name].dtype, tensors[name].shape)


def _made(
    expression: Expression,
    tensors: Mapping[str, StoredTensor],
    derived: Mapping[str, StoredTensor],
) -> TensorType:
    """The type of what an expression makes; nothing is read and nothing allocated."""
    with torch.device("meta"):
        is_ = make(expression, partial(_blank, tensors), partial(_blank, derived))
    return TensorType(is_.dtype, tuple(is_.shape))


def _blank(tensors: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    """A tensor without data in place of a stored one."""
    return torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
