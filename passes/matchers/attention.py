"""A call of paged attention between the calls that write and read its cache, while it is lowered."""

from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu, ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import IntsType, TensorType, dtype_name, size

ATEN = torch.ops.aten
TO = ATEN.to.dtype
TOKENS = size("T")
MASK = 2048  # the side of the mask that sparse modes 3 and 4 take


@dataclass
class CacheSide:
    """The K or the V of one attention: the write, and what reads it back (None: a float cache).

    Where tokens have each a scale, those are written beside it.
    """

    write: Node
    back: Node | None
    steps: Node | None = None

    @property
    def rows(self) -> Node:
        """The float rows that go into the cache."""
        codes = argument(self.write, 1)
        if self.back is None:
            return codes
        quantized = argument(codes, 0)
        if self.steps is not None:  # an item of what npu_dynamic_quant gives
            quantized = argument(quantized, 0)
        return argument(argument(quantized, 0), 0)

    @property
    def shape(self) -> list[int]:
        """Heads and channels of a row."""
        return [int(d) for d in tensor_type(self.write).shape[2:]]


@dataclass
class AttentionSite:
    """A call of paged attention, its cache written by one scatter."""

    program: Program
    node: Node
    k: CacheSide
    v: CacheSide
    shared: dict[str, Node]  # what all layers take, by name: looked up once, and not in each

    @property
    def heads(self) -> dict[str, Argument]:
        """Heads and scale, as the op names them."""
        heads, scale = int(tensor_type(self.node).shape[1]), self.node.args[6]
        return {"num_heads": heads, "scale": scale, "num_key_value_heads": self.k.shape[0]}

    @property
    def window(self) -> int:
        """Tokens that a query sees, itself included; 0 for all."""
        window = self.node.args[7]
        assert isinstance(window, int)
        return window

    @property
    def sinks(self) -> Node | None:
        """One more logit a head, [heads], if there are any."""
        sinks = self.node.args[9]
        return sinks if isinstance(sinks, Node) else None

    def call(self, op: object, *args: Argument, **kwargs: Argument) -> Node:
        """Put a call ahead of the attention."""
        return self.program.call(self.node, op, *args, kwargs=kwargs)  # type: ignore[arg-type]

    def input(self, name: str, type_: TensorType | IntsType) -> Node:
        """The input of that name, one for all layers."""
        if name not in self.shared:
            found = [node for node in self.program.inputs() if node.name == name]
            self.shared[name] = found[0] if found else self.program.placeholder(name, type_)
        return self.shared[name]


def find_side(cache: Node) -> CacheSide | None:
    """How the cache that an attention reads was written; None where this program does not."""
    if is_call(cache, ops.dequantize_tokens):
        writes = argument(cache, 0), argument(cache, 1)
        mine = all(is_call(write, ops.cache_write) for write in writes)
        return CacheSide(writes[0], cache, writes[1]) if mine else None
    back = dequantizer(cache)
    write = argument(argument(back, 0), 0) if back is not None else cache
    return CacheSide(write, back) if is_call(write, ops.cache_write) else None


def width(x: Node) -> int:
    """Channels of a row [T, heads, head_dim]."""
    _, heads, dim = tensor_type(x).shape
    return int(heads) * int(dim)


def in_dtype(program: Program, source: Node, dtype: torch.dtype) -> Node:
    """A parameter in another dtype, cast at load time."""
    if tensor_type(source).dtype is dtype:
        return source
    type_ = TensorType(dtype, tensor_type(source).shape)
    name = f"{source.name}_{dtype_name(dtype)}"
    return program.placeholder(name, type_, cast(expression_of(source), dtype))


def dequantized(site: AttentionSite, side: CacheSide, codes: Node, steps: Node | None) -> Node:
    """What the cache would give back of codes [..., heads, head_dim], as rows of the same shape.

    With `steps`, [..., 1, 1] in float32, each token has a scale: in float32, as the product is.
    """
    if side.back is None:
        return codes
    if steps is not None:
        dtype = tensor_type(side.back).dtype
        wide = site.call(ATEN.mul.Tensor, site.call(TO, codes, torch.float32), steps)
        return site.call(TO, wide, dtype) if dtype is not torch.float32 else wide
    flat = site.call(ATEN.reshape.default, codes, [-1, width(codes)])
    wide = site.call(npu.npu_anti_quant, flat, side.back.args[1], **side.back.kwargs)
    return site.call(ATEN.reshape.default, wide, [-1, *side.shape])


def dequantizer(cache: Node) -> Node | None:
    """The npu_anti_quant that made float what an attention reads; None for another cache."""
    if not is_call(cache, ATEN.unflatten.int):
        return None
    back = argument(cache, 0)
    return back if is_call(back, npu.npu_anti_quant) else None


def scattered(site: AttentionSite) -> tuple[Node, Node]:
    """Write K and V of a layer by one op; gives the caches as they then are."""
    return _scattered(site, site.k.write, site.v.write)


def scattered_steps(site: AttentionSite) -> tuple[Node | None, Node | None]:
    """The same of the scales that tokens have, where they have any."""
    k, v = site.k.steps, site.v.steps
    return (None, None) if k is None or v is None else _scattered(site, k, v)


def _scattered(site: AttentionSite, k: Node, v: Node) -> tuple[Node, Node]:
    codes = (argument(k, 1), argument(v, 1), argument(k, 0), argument(v, 0), argument(k, 2))
    both = site.call(npu.npu_scatter_pa_kv_cache_functional, *codes, cache_mode="Norm")
    new = site.call(getitem, both, 0), site.call(getitem, both, 1)
    for old, made in zip((k, v), new, strict=True):
        # what read it until now comes earlier and dies with the attention
        old.replace_all_uses_with(made, lambda user: user.op == "output")
    return new


def all_pages(site: AttentionSite) -> dict[str, Argument]:
    """The pages and the length of each sequence; a token is a sequence."""
    table = argument(site.node, 3)
    table.meta["type"] = TensorType(torch.int32, (TOKENS, size("M")))
    kv_lens = site.input("kv_lens", IntsType(TOKENS))
    return {"actual_seq_lengths_kv": kv_lens, "block_table": table}


def gathered(site: AttentionSite, cache: Node) -> Node:
    """The rows of a cache of all tokens of the sequences, [rows, heads, channels]."""
    slots = site.input("kv_slots", TensorType(torch.int32, (size("L"),)))
    flat = site.call(ATEN.flatten.using_ints, cache, 0, 1)
    return site.call(ATEN.index_select.default, flat, 0, slots)


def end_to_end(site: AttentionSite, kv_ends: str) -> dict[str, Argument]:
    """Where each sequence ends among rows that lie end to end (TND), those of queries and of keys."""
    lengths = IntsType(size("B"))
    queries = site.input("query_ends", lengths)
    return {
        "actual_seq_lengths": queries,
        "actual_seq_lengths_kv": site.input(kv_ends, lengths),
    }


def attended(
    site: AttentionSite, q: Node, k: Node, v: Node, options: dict[str, Argument], like: Node
) -> tuple[Node, Node]:
    """The attention: its result as rows of the shape of `like`, and all that the op gives."""
    both = site.call(npu.npu_fused_infer_attention_score, q, k, v, **options)
    shape = [int(d) for d in tensor_type(like).shape[1:]]
    out = site.call(getitem, both, 0)
    reshape, name = ATEN.reshape.default, site.node.name
    return site.program.call(site.node, reshape, out, [-1, *shape], name=name), both


def causal_mask(site: AttentionSite) -> Node:
    """The triangle that sparse modes 3 and 4 take, whatever the lengths; one for all layers."""
    if "causal_mask" not in site.shared:
        type_, expression = (
            TensorType(torch.bool, (MASK, MASK)),
            Expression("masked_above", (MASK,)),
        )
        site.shared["causal_mask"] = site.program.placeholder("causal_mask", type_, expression)
    return site.shared["causal_mask"]
