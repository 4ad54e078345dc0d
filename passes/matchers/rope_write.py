"""A write to a cache, of rows that one linear gives and that are rotated: with queries to match."""

from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.packing import parameters, parts
from kvc8.ir.program import argument, expression_of, is_call, tensor_type, unshaped
from kvc8.passes.matchers.cache_write import codes_of, has_angles_of_tokens, readers

ATEN = torch.ops.aten
LINEARS = (ATEN.linear.default, npu.npu_quant_matmul)


@dataclass
class CacheWriteSite:
    """One cache write, and where what it writes comes from."""

    write: Node
    linear: Node  # gives q, k and v
    split: Node
    q: Node  # the rotated queries, [1, T, heads, D]
    k: Node  # the rotated keys, [1, T, kv_heads, D]
    v: Node  # the values, as they come out of the split
    normed: bool  # whether q and k are normalized between the split and the rotation
    quantize_k: Node
    quantize_v: Node

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, kv heads, and channels of a head."""
        heads, dim = (int(d) for d in tensor_type(self.q).shape[2:])
        return heads, int(tensor_type(self.k).shape[2]), dim

    @property
    def here(self) -> Node:
        """What the op goes ahead of: the first that reads what it takes."""
        return min(self.q, self.k) if self.normed else self.split


def find_site(write: Node) -> CacheWriteSite | str:
    """The site of a cache write, or why it is none."""
    codes = codes_of(write, "Norm", "its cache is in NZ format, which the op does not write")
    if isinstance(codes, str):
        return codes
    turned, v = (unshaped(argument(node, 0)) for node in codes)
    if not is_call(turned, npu.npu_rotary_mul):
        return "its keys do not come out of npu_rotary_mul"
    k = _before_norm(unshaped(argument(turned, 0)))
    if not is_call(k, getitem) or not is_call(argument(k, 0), ATEN.split_with_sizes.default):
        return f"its keys pass through {_called(k)} before they are rotated"
    return _queries(write, turned, k, v, codes)


def _queries(
    write: Node, turned: Node, k: Node, v: Node, codes: list[Node]
) -> CacheWriteSite | str:
    split = argument(k, 0)
    items = {item.args[1]: item for item in split.users}
    if [k, v] != [items.get(1), items.get(2)] or 0 not in items:
        return "its q, k and v are not made by one linear"
    of_q, of_k = _rotation(items[0]), _rotation(k)
    q = of_q[-1] if of_q else None
    if q is None or of_q is None or q.args[1:] != turned.args[1:]:
        return "its queries are not rotated as its keys are"
    if of_k is None or of_k[-1] is not turned:
        return "its keys are read before they are rotated"
    normed = len(of_k) > 1
    if len(of_q) != len(of_k) or max([v, *of_q[:-1], *of_k[:-1]]) > min(q, turned):
        return "its queries are not normalized as its keys are"
    if not has_angles_of_tokens(turned):
        return "its cosines are not those of [1, T, 1, D]"
    if not is_call(argument(split, 0), *LINEARS) or not _fits_parts(split, turned, write):
        return "its q, k and v are not made by one linear"
    return CacheWriteSite(write, argument(split, 0), split, q, turned, v, normed, *codes)


def _before_norm(x: Node) -> Node:
    """What was normalized to give a value, if it was."""
    norm = argument(x, 0) if is_call(x, getitem) else x
    return unshaped(argument(norm, 0)) if is_call(norm, npu.npu_rms_norm) else x


def _rotation(part: Node) -> list[Node] | None:
    """What q or k alone goes through: the norm and what it gives, if there is one; the rotation."""
    found = [part]
    for op in (npu.npu_rms_norm, getitem, npu.npu_rotary_mul):
        following = readers(found[-1])
        [node] = following if len(following) == 1 else [part]
        if is_call(node, op):
            found.append(node)
    kinds = [node.target for node in found[1:]]
    whole = ([npu.npu_rotary_mul], [npu.npu_rms_norm, getitem, npu.npu_rotary_mul])
    return found[1:] if kinds in whole else None


def _fits_parts(split: Node, turned: Node, write: Node) -> bool:
    """Whether k and v are alike and the linear's parameters lie q, k, v."""
    sizes = split.args[1]
    assert isinstance(sizes, list | tuple)
    shapes = [tensor_type(argument(write, i)).shape[2:] for i in (2, 3)]
    tensors = parameters(argument(split, 0))
    packed = all(len(parts(expression_of(node))) == len(sizes) for node in tensors)
    return len(sizes) == 3 and shapes[0] == shapes[1] == tensor_type(turned).shape[2:] and packed


def _called(node: Node) -> str:
    source = argument(node, 0) if is_call(node, getitem) else node
    return (
        source.name if source.op == "placeholder" else str(source.target).removesuffix(".default")
    )
