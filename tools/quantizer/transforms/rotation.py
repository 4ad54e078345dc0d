"""Rotate a model so that int8 fits it better. It computes what it did, at the same cost.

In float, a rotation of the residual stream changes nothing: what writes to it is multiplied by an
orthogonal R, what reads it by R's inverse, and an RMSNorm between them commutes with R once its
weight is folded into the linears that read it. A language model's stream has a few channels that
are hundreds of times larger than the others. They are spread over all channels, and a static
per-tensor int8 scale then loses little (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024).
In the same way V is turned within each head between v_proj and o_proj, which serves V's cache and
o_proj's input.

    embed_tokens, lm_head                   W R, lm_head with the last norm's weight folded in
    q_proj k_proj gate_proj up_proj         W diag(norm) R
    v_proj                                  Rhᵀ W diag(norm) R       Rh in each head
    a router, and experts' likewise         W diag(norm) R
    o_proj                                  Rᵀ W Rh
    down_proj, experts' too                 Rᵀ W
    biases of v_proj; o_proj, down_proj     Rhᵀ b; Rᵀ b
    norms                                   1

A tied lm_head has to be untied, for only it takes the last norm's weight: the model grows by one
embedding. Only what is known to be built so is rotated: pre-norm decoders whose RMSNorm multiplies
by its weight as stored, without scaling of the stream, and of whose tensors none is unknown.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.checkpoint.model_files import listed
from kvc8.ir.checkpoint.reader import Checkpoint, StoredTensor, open_checkpoint
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.errors import ModelError
from kvc8.tools.quantizer.transforms.orthogonal import Orthogonal, random_orthogonal
from kvc8.tools.quantizer.writer import Entry, write_json, write_tensors

MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "glm4_moe")
EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
NORM_OF: Mapping[str, str] = {
    **{f"self_attn.{x}_proj.weight": "input_layernorm.weight" for x in "qkv"},
    **{
        f"{mlp}.{x}_proj.weight": "post_attention_layernorm.weight"
        for mlp in ("mlp", "mlp.experts.*", "mlp.shared_experts", "mlp.shared_expert")
        for x in ("gate", "up")
    },
    "mlp.gate.weight": "post_attention_layernorm.weight",  # a router
    "mlp.shared_expert_gate.weight": "post_attention_layernorm.weight",
}
EXPERT = re.compile(r"mlp\.experts\.\d+\.")
WRITERS = (  # to the residual stream
    *("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    *("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj"),
)
UNTOUCHED = (
    *(f"self_attn.{x}_proj.bias" for x in "qk"),
    *(f"mlp.{x}_proj.bias" for x in ("gate", "up")),
    *(f"self_attn.{x}_norm.weight" for x in "qk"),  # these norm heads, after q_proj and k_proj
    "self_attn.rotary_emb.inv_freq",
    "mlp.gate.e_score_correction_bias",
)
Read = Callable[[str], Tensor]  # a stored tensor by name


@dataclass(frozen=True)
class Rotation:
    """What is turned: the residual stream, if it is, and V within each head."""

    residual: Orthogonal | None
    head: Orthogonal


def find_rotation(checkpoint: Checkpoint, residual: bool, seed: int) -> Rotation | str:
    """The rotation of a model, or why it cannot be rotated."""
    config = checkpoint.config
    kind = config.get("model_type")
    if kind not in MODELS:
        return f"model_type {kind} is not known to allow it"
    strange = [name for name in checkpoint.tensors if not _known(name)]
    if strange:
        return f"the model holds {listed(strange)}"
    hidden, heads = (config.get(x) for x in ("hidden_size", "num_attention_heads"))
    assert isinstance(hidden, int)
    assert isinstance(heads, int)
    dim = config.get("head_dim") or hidden // heads
    assert isinstance(dim, int)
    stream = random_orthogonal(hidden, seed) if residual else None
    return Rotation(stream, random_orthogonal(dim, seed + 1))


def _known(name: str) -> bool:
    _, part = _place(name)
    writers = [f"{writer}.{end}" for writer in WRITERS for end in ("weight", "bias")]
    norms = NORM_OF.values()
    return part in (
        *(EMBEDDING, HEAD, LAST_NORM),
        *(*NORM_OF, *writers, *norms, *UNTOUCHED),
        "self_attn.v_proj.bias",
    )


def _place(name: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, "" where none, and its name there, `*` for an expert."""
    layer = LAYER.fullmatch(name)
    prefix, part = (layer[1], layer[2]) if layer else ("", name)
    return prefix, EXPERT.sub("mlp.experts.*.", part)


def turned(name: str, read: Read, rotation: Rotation) -> Tensor:
    """A tensor of the rotated model, in the dtype of the stored one, rounded once."""
    prefix, part = _place(name)
    stored = read(name)
    # Two turns may meet in a layer's linear; an embedding has one, and is too large for float32.
    wide = prefix and stored.dtype is not torch.float64
    value = stored.float() if wide else stored
    if rotation.residual is not None:
        value = _in_stream(prefix, part, value, read, rotation.residual)
    return _in_heads(part, value, rotation.head).to(stored.dtype)


def _in_stream(prefix: str, part: str, value: Tensor, read: Read, stream: Orthogonal) -> Tensor:
    if part in NORM_OF or part == HEAD:
        return stream.turn(value, read(prefix + NORM_OF.get(part, LAST_NORM)))
    if part in NORM_OF.values() or part == LAST_NORM:
        return torch.ones_like(value)
    if part == EMBEDDING:
        return stream.turn(value)
    if part.startswith(WRITERS):  # a bias is a row, and a weight has outputs by row
        return stream.turn(value.t()).t().contiguous()
    return value


def _in_heads(part: str, value: Tensor, head: Orthogonal) -> Tensor:
    if part == "self_attn.v_proj.weight":
        heads = value.unflatten(0, (-1, head.size)).transpose(1, 2)
        return head.turn(heads).transpose(1, 2).reshape(value.shape)
    if part in ("self_attn.v_proj.bias", "self_attn.o_proj.weight"):
        return head.turn(value.unflatten(-1, (-1, head.size))).reshape(value.shape)
    return value


def rotate(checkpoint: Checkpoint, rotation: Rotation, directory: Path) -> Checkpoint:
    """Write the rotated float model to a directory, and open it; one tensor is held at a time.

    A directory that is there already is taken to be that model. The result keeps the path of what
    it was made from, by which messages name it. Raises ModelError for a number that the stored
    dtype cannot hold.
    """
    if not directory.exists():
        _write(checkpoint, rotation, directory)
    return replace(open_checkpoint(directory), path=checkpoint.path)


def _write(checkpoint: Checkpoint, rotation: Rotation, directory: Path) -> None:
    new = directory.with_name(f"{directory.name}.new")
    new.mkdir(exist_ok=True)
    tied = bool(checkpoint.config.get("tie_word_embeddings")) and rotation.residual is not None
    sources = dict(checkpoint.tensors)
    if tied:
        sources[HEAD] = replace(sources[EMBEDDING], name=HEAD)
    floats = {name: t for name, t in sources.items() if t.dtype.is_floating_point}
    entries = [Entry(name, t.dtype, t.shape, "FLOAT") for name, t in floats.items()]
    tensors = ((name, _sound(name, floats, rotation)) for name in floats)
    write_tensors(new / "model.safetensors", entries, tensors)
    config = dict(checkpoint.config)
    write_json(new / "config.json", config | ({"tie_word_embeddings": False} if tied else {}))
    new.rename(directory)


def untied_bytes(before: Checkpoint, after: Checkpoint) -> int:
    """By how much a rotated model is larger than what it was made from."""
    a, b = (sum(t.nbytes for t in x.tensors.values()) for x in (before, after))
    return b - a


def _sound(name: str, stored: Mapping[str, StoredTensor], rotation: Rotation) -> Tensor:
    made = turned(name, lambda other: load(stored[other]), rotation)
    low, high = torch.aminmax(made)  # a NaN is both; and no mask as large as an embedding
    if not bool(low.isfinite() & high.isfinite()):
        raise ModelError(name, "is not finite when it is rotated", "use --rotate off")
    return made
