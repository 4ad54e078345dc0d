"""Account for every stored tensor of a captured model: used, known to be spare, or reported.

Anti-outlier methods of msModelSlim may give a norm a bias that its model does not have; it is added
after the norm. A bias of anything else that the model does not have would be lost, and is an error.

Spare are: what describes a W8A8 weight twice (weight_scale, weight_offset of zeros, the bias inside
quant_bias), offsets of zeros, biases of zeros, the second copies of norms, the second copy of
an embedding that is the lm_head too, and buffers that transformers works out by itself.
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from kvc8.ir.checkpoint.model_files import listed
from kvc8.ir.checkpoint.msmodelslim import tied_head
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import ModelError, ModelWarning
from kvc8.ir.expression import cast, stored, stored_names
from kvc8.ir.program import Program, tensor_type
from kvc8.ir.types import TensorType

ADD = torch.ops.aten.add.Tensor
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


def add_norm_biases(checkpoint: Checkpoint, program: Program) -> list[str]:
    """Add the biases that an anti-outlier method gave to norms; gives the tensors' names."""
    used = _used(program)
    last = {node.meta.get("origin", ""): node for node in program.graph.nodes}
    added = []
    for name in checkpoint.tensors:
        module = name.removesuffix(".bias")
        if name in used or not name.endswith("norm.bias") or f"{module}.weight" not in used:
            continue
        if module in last and bool(checkpoint.read(name).any()):
            _add(program, last[module], name)
            added.append(name)
    return added


def _add(program: Program, norm: Node, name: str) -> None:
    """Add the stored bias `name` to what a norm gives, in the dtype of that."""
    found = tensor_type(norm)
    type_ = TensorType(found.dtype, found.shape[-1:])
    bias = program.placeholder(name.replace(".", "_"), type_, cast(stored(name), found.dtype))
    users = list(norm.users)
    moved = program.call(norm.next, ADD, norm, bias, name="norm_bias")
    moved.meta["origin"] = norm.meta["origin"]
    for user in users:
        user.replace_input_with(norm, moved)


def account(checkpoint: Checkpoint, program: Program) -> list[ModelWarning]:
    """Report the stored tensors that a program does not use and that are not known to be spare.

    Raises ModelError for a bias that is not zero, and for a W8A8 weight that is not symmetric.
    """
    used, where = _used(program), checkpoint.path.name
    spare = used | set(_spare(checkpoint, used))
    left = [name for name in checkpoint.tensors if name not in spare]
    for name in left:
        if name.endswith(".bias") and bool(checkpoint.read(name).any()):
            what = f"{name} is not zero and the model has no such bias"
            raise ModelError(where, what, "quantize with anti-outlier method m3 or none")
    rest = [name for name in left if not name.endswith((".bias", *BUFFERS))]
    what = f"holds {listed(rest)}, which the model does not use"
    do = "check that config.json belongs to these weights"
    return [ModelWarning(where, what, do)] if rest else []


def _used(program: Program) -> set[str]:
    expressions = [
        node.meta["expression"] for node in program.graph.nodes if "expression" in node.meta
    ]
    return {name for expression in expressions for name in stored_names(expression)}


def _spare(checkpoint: Checkpoint, used: set[str]) -> Iterator[str]:
    """The tensors that a program need not use."""
    for linear in checkpoint.w8a8.values():
        if linear.weight not in used:
            continue
        if linear.weight_offset and bool(checkpoint.read(linear.weight_offset).any()):
            what = f"{linear.weight_offset} is not zero"
            do = "quantize the weights symmetrically (w_sym=True)"
            raise ModelError(checkpoint.path.name, what, do)
        yield from linear.tensors.values()
    for side in (side for pair in checkpoint.kv.values() for side in pair):
        yield from (
            name for name in (side.scale, side.offset) if name
        )  # zeros are in no expression
    head_serves = any(tied_head(name, checkpoint.config) for name in used)
    for name in checkpoint.tensors:
        table = head_serves and name.endswith("embed_tokens.weight")
        if table or ".module." in name or tied_head(name, checkpoint.config):
            yield name
