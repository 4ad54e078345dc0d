"""What a call asks of a device, as facts with names that legality.json speaks of.

Every argument of the op's schema gives facts by itself: `query dtype`, `query rank`,
`query shape`, `query last dim`; whether an optional one is "given" or "none"; and numbers,
strings and switches as they are. The functions below add what a document speaks of and no one
argument says, such as `head_dim` and `query rows`. A fact whose value is not known at compile
time (the number of tokens) is left out, and then breaks no limit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from torch._ops import OpOverload
from torch.fx import Node

from kvc8.ir.program import op_name, tensor_type, type_of
from kvc8.ir.types import Dim, TensorType, dtype_name, size

Fact: TypeAlias = int | str | bool
Facts: TypeAlias = dict[str, Fact]
NZ_RANK = 5  # of a cache [blocks, heads, head_dim/c, block_size, c]


@dataclass(frozen=True)
class OpCall:
    """The call of an NPU op, its arguments by the names of the op's schema."""

    node: Node
    arguments: Mapping[str, object]
    block_size: int  # what the size S stands for

    @property
    def op(self) -> str:
        """What the op is called, without its namespace."""
        assert isinstance(self.node.target, OpOverload)
        return op_name(self.node.target)

    def shape(self, name: str) -> tuple[Dim, ...]:
        """The shape of a tensor argument, the block size put in; () where it is none."""
        found = self.arguments.get(name)
        if not isinstance(found, Node) or not isinstance(type_of(found), TensorType):
            return ()
        return tuple(self._known(d) for d in tensor_type(found).shape)

    def _known(self, d: Dim) -> Dim:
        return self.block_size if d == size("S") else d

    def number(self, name: str) -> int:
        """A whole number among the arguments; 0 where it is none."""
        found = self.arguments.get(name)
        return found if isinstance(found, int) else 0


def call(node: Node, block_size: int) -> OpCall:
    """A node's call with the arguments that it leaves out at their defaults."""
    assert isinstance(node.target, OpOverload)
    found: dict[str, object] = {}
    for at, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name, default)
        found[argument.name] = given
    return OpCall(node, found, block_size)


def facts(node: Node, block_size: int) -> Facts:
    """All facts of a call."""
    made = call(node, block_size)
    found: Facts = {}
    for name in made.arguments:
        found |= _of_argument(made, name)
    result = type_of(node)
    if isinstance(result, TensorType):
        found["output dtype"] = dtype_name(result.dtype)
    return found | DERIVED.get(made.op, _nothing)(made)


def _of_argument(made: OpCall, name: str) -> Facts:
    value = made.arguments[name]
    if value is None:
        return {name: "none"}
    if isinstance(value, bool | int | str):
        return {name: value}
    if not isinstance(value, Node) or not isinstance(type_of(value), TensorType):
        return {name: "given"}
    shape = made.shape(name)
    found: Facts = {
        name: "given",
        f"{name} dtype": dtype_name(tensor_type(value).dtype),
        f"{name} rank": len(shape),
    }
    if all(isinstance(d, int) for d in shape):
        found[f"{name} shape"] = str(list(shape))
    return found | _known(**{f"{name} last dim": shape[-1] if shape else None})


def _known(**candidates: Dim | None) -> Facts:
    """Those of the candidates that are numbers."""
    return {name: value for name, value in candidates.items() if isinstance(value, int)}


def _nothing(_: OpCall) -> Facts:
    return {}


def _matmul(made: OpCall) -> Facts:
    shape = made.shape("x2")
    return _known(**{"inner size": shape[-2], "outer size": shape[-1]})


def _attention(made: OpCall) -> Facts:
    """Of npu_fused_infer_attention_score and npu_incre_flash_attention."""
    heads = made.number("num_heads")
    kv_heads = made.number("num_key_value_heads") or heads
    query, layout = made.shape("query"), str(made.arguments["input_layout"])
    width = query[-1] if layout == "BSH" else None
    head_dim = query[-1]
    if isinstance(width, int) and heads:
        head_dim = width // heads
    paged = made.arguments.get("block_table") is not None
    found = _heads(heads, kv_heads) | _known(head_dim=head_dim) | _rows(layout, query)
    found |= _offsets(made) | (_pages(made, made.shape("key")) if paged else {})
    return found | _rope(made, heads, layout) | _page(found)


def _rope(made: OpCall, heads: int, layout: str) -> Facts:
    """Channels of a head that are rotated and lie apart."""
    shape = made.shape("query_rope")
    wide = shape[-1] if shape else None
    if isinstance(wide, int) and layout == "BSH" and heads:
        wide //= heads
    return _known(**{"rotated channels": wide})


def _heads(heads: int, kv_heads: int) -> Facts:
    return {
        "heads": heads,
        "kv heads": kv_heads,
        "heads and kv heads": f"{heads} and {kv_heads}",
    }


def _rows(layout: str, query: tuple[Dim, ...]) -> Facts:
    """Query rows a sequence: a number, "several", or in TND "any"."""
    if layout == "TND":
        return {"query rows": "any", "one query row": False}
    rows = query[2] if layout == "BNSD" else query[1]
    return {"query rows": rows if isinstance(rows, int) else "several", "one query row": rows == 1}


def _offsets(made: OpCall) -> Facts:
    names = ("antiquant_offset", "key_antiquant_offset", "value_antiquant_offset")
    given = any(made.arguments.get(name) is not None for name in names)
    return {"offsets": "given" if given else "none"}


def _pages(made: OpCall, cache: tuple[Dim, ...]) -> Facts:
    """Of a cache read through a block table, by its rank."""
    key = made.arguments.get("key", made.arguments.get("key_cache"))
    block_at = {3: 1, 4: 2, NZ_RANK: 3}
    found: Facts = {
        "pages": dtype_name(tensor_type(key).dtype),
        "cache format": "NZ" if len(cache) == NZ_RANK else "ND",
    }
    if len(cache) not in block_at:
        return found
    wide = cache[2] if len(cache) == 3 else None
    return found | _known(**{"block size": cache[block_at[len(cache)]], "page width": wide})


def _page(found: Facts) -> Facts:
    """What the ops of ATB limit: the values of a head in a block."""
    block, head_dim = found.get("block size"), found.get("head_dim")
    if not isinstance(block, int) or not isinstance(head_dim, int):
        return {}
    return {"block size x head_dim": block * head_dim}


def _atb_attention(made: OpCall) -> Facts:
    """Of atb::_npu_paged_attention and atb::_npu_paged_attention_quant: [blocks, size, H, D]."""
    cache = made.shape("key_cache")
    found = _heads(made.number("num_heads"), made.number("num_kv_heads"))
    found |= {"pages": dtype_name(tensor_type(made.arguments["key_cache"]).dtype)}
    found |= {"query rows": 1, "offsets": "none", "cache format": "ND"}
    found |= _known(**{"head_dim": cache[3], "block size": cache[1]})
    return found | _page(found)


def _scatter(made: OpCall) -> Facts:
    rows = made.shape("key")
    wide = int(rows[-1]) * int(rows[-2]) if len(rows) > 1 else None
    return _known(**{"row width": wide})


def _qkv_cache(made: OpCall) -> Facts:
    """Of npu_qkv_rms_norm_rope_cache: caches [blocks, pieces, size, 32]."""
    cache = made.shape("k_cache")
    return _known(**{"block size": cache[2] if len(cache) == 4 else None})


def _norm_quant(made: OpCall) -> Facts:
    gamma = made.shape("gamma")
    return _known(**{"gamma rows": gamma[0] if len(gamma) == 2 else 1})


def _swiglu(made: OpCall) -> Facts:
    shape = made.shape("x" if "x" in made.arguments else "input")
    return _known(**{"gate and up width": shape[-1]})


def _gating(made: OpCall) -> Facts:
    """Of npu_moe_gating_top_k: experts a group, and all of them where each group fills 32s."""
    groups, experts = made.number("group_count"), made.shape("x")[-1]
    if groups < 2 or not isinstance(experts, int):
        return {}
    each = experts // groups
    return {"experts a group": each, "aligned experts": -(-each // 32) * 32 * groups}


def _grouped(made: OpCall) -> Facts:
    """Of npu_grouped_matmul, whose tensors come in lists of one."""
    found: Facts = {}
    for name in ("x", "weight", "scale", "per_token_scale"):
        items = made.arguments[name]
        if isinstance(items, list | tuple) and len(items) == 1:
            type_ = tensor_type(items[0])
            found |= {f"{name} dtype": dtype_name(type_.dtype), f"{name} rank": len(type_.shape)}
            shape = type_.shape
            if name == "weight" and len(shape) == 3:
                found |= _known(
                    **{"groups": shape[0], "inner size": shape[1], "outer size": shape[2]}
                )
    result = type_of(made.node)
    if isinstance(result, tuple) and result and isinstance(result[0], TensorType):
        found["output dtype"] = dtype_name(result[0].dtype)
    return found


DERIVED: Mapping[str, Callable[[OpCall], Facts]] = MappingProxyType(
    {
        "npu_quant_matmul": _matmul,
        "npu_fused_infer_attention_score": _attention,
        "npu_incre_flash_attention": _attention,
        "_npu_paged_attention": _atb_attention,
        "_npu_paged_attention_quant": _atb_attention,
        "npu_scatter_pa_kv_cache": _scatter,
        "npu_scatter_pa_kv_cache_functional": _scatter,
        "_npu_reshape_and_cache": _scatter,
        "npu_qkv_rms_norm_rope_cache": _qkv_cache,
        "npu_rms_norm_quant": _norm_quant,
        "npu_swiglu": _swiglu,
        "npu_swiglu_quant": _swiglu,
        "npu_dequant_swiglu_quant": _swiglu,
        "npu_geglu": _swiglu,
        "npu_moe_gating_top_k": _gating,
        "npu_grouped_matmul": _grouped,
    }
)
