"""Why a lowered program calls the ops that it calls, and not others.

For each role that an op plays: what was chosen and why, and for each alternative the row of
legality.json that the same site would break, or, where it would be legal, why it ranks behind.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from torch.fx import Node

from kvc8.backends.npu.facts import facts
from kvc8.backends.npu.legality import Limit, breaks, limits
from kvc8.ir.program import Program, op_name

FIA = "npu_fused_infer_attention_score"


@dataclass(frozen=True)
class Role:
    """Something that a program must do, the ops that do it, and the ops that could."""

    name: str
    ops: tuple[str, ...]
    why: str
    others: Mapping[str, str]  # by op, why it ranks behind where it is legal
    paged: bool | None = None  # only with a block table, or only without


# In the order of a decoder layer.
ROLES = (
    Role(
        "norm and quantization",
        ("npu_add_rms_norm_quant", "npu_rms_norm_quant"),
        "one launch adds, normalizes and quantizes",
        {"npu_rms_norm": "an addition, a norm and a quantization are three launches"},
    ),
    Role(
        "norm",
        ("npu_rms_norm", "npu_add_rms_norm"),
        "something reads the float norm, or fusion was turned off",
        {"npu_add_rms_norm_quant": "it gives codes"},
    ),
    Role(
        "quantization",
        ("npu_quantize",),
        "divides by the checkpoint's static scale in float32, as the checkpoint's producer does",
        {
            "npu_dynamic_quant": "it measures a scale a token, and the checkpoint has static ones",
            "_npu_quantize_per_tensor": "it rounds to half precision before it rounds to a code",
        },
    ),
    Role(
        "W8A8 linear",
        ("npu_quant_matmul",),
        "multiplies int8 by int8 and dequantizes on the way out, in one launch",
        {"linear": "it would read the weight in float16, twice the bytes"},
    ),
    Role(
        "RoPE, quantization and cache write",
        ("npu_rope_quant_kvcache",),
        "one launch splits q, k and v, rotates, quantizes and writes to pages",
        {
            "npu_qkv_rms_norm_rope_cache": "it normalizes q and k too, and writes NZ pages",
            "npu_dequant_rope_quant_kvcache": "it takes int32 sums, and npu_quant_matmul gives the "
            "dequantized ones in the same launch",
        },
    ),
    Role(
        "q and k norms, RoPE, quantization and cache write",
        ("npu_qkv_rms_norm_rope_cache",),
        "one launch splits q, k and v, normalizes, rotates, quantizes and writes to NZ pages",
        {
            "npu_rope_quant_kvcache": "it normalizes nothing, and writes ND pages",
            "npu_scatter_pa_kv_cache": "a split, two norms, two rotations and two quantizations "
            "would come before it",
        },
    ),
    Role(
        "cache write",
        ("npu_scatter_pa_kv_cache", "npu_scatter_pa_kv_cache_functional"),
        "writes K and V to pages in one launch, and torchair has a converter for it",
        {
            "_npu_reshape_and_cache": "it does the same, and torchair has no converter for it",
            "npu_scatter_nd_update_": "it takes a launch for K and another for V",
            "npu_quant_scatter_": "it writes to a contiguous cache, which has no pages",
        },
    ),
    Role(
        "attention over pages",
        (FIA,),
        "reads int8 pages and dequantizes inside, one query a sequence, with offsets or without",
        {
            "npu_incre_flash_attention": f"{FIA} calls the same kernel, and is what the vendor's "
            "runtimes use",
            "_npu_paged_attention_quant": "the vendor tests it with int8 queries only, and "
            "torchair has no converter for it",
            "_npu_paged_attention": "it is for float pages, and torchair has no converter for it",
        },
        paged=True,
    ),
    Role(
        "attention over a prompt",
        (FIA,),
        "takes causal masks and bands, and the prompts end to end where heads are 128 or 192 wide",
        {"npu_incre_flash_attention": "it takes one query a sequence"},
        paged=False,
    ),
    Role(
        "dequantization of pages",
        ("npu_anti_quant",),
        "reads gathered codes; attention with several queries a sequence takes no int8 pages",
        {},
    ),
    Role(
        "SwiGLU and quantization",
        ("npu_dequant_swiglu_quant",),
        "one launch activates and quantizes; it divides by the scale as the checkpoint means it",
        {
            "npu_swiglu_quant": "it multiplies by its scale, which rounds otherwise, and older "
            "CANN takes it for mixtures of experts only",
            "npu_swiglu": "activation and quantization are two launches",
        },
    ),
    Role(
        "SwiGLU",
        ("npu_swiglu",),
        "the next linear is float, or fusion was turned off",
        {"npu_dequant_swiglu_quant": "it gives codes"},
    ),
    Role(
        "GeGLU",
        ("npu_geglu",),
        "activates either half of a linear and multiplies, in one launch",
        {"npu_dequant_swiglu_quant": "it activates by SiLU"},
    ),
)


@dataclass(frozen=True)
class Choice:
    """What a program does for one role."""

    role: str
    calls: Mapping[str, int]  # by op
    why: str
    others: Mapping[str, str]  # by op, why not

    def lines(self) -> Iterator[str]:
        """As text."""
        chosen = ", ".join(f"{count} {op}" for op, count in self.calls.items())
        yield f"{self.role}: {chosen}: {self.why}"
        yield from (f"    not {op}: {why}" for op, why in self.others.items())

    def as_json(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self)


def explain(program: Program, soc: str, block_size: int) -> list[Choice]:
    """The choices of a lowered program, in the order of a decoder layer.

    Raises TargetError for a soc that has no limits.
    """
    table = limits(soc)
    named = [(op_name(n.target), n) for n in program.graph.nodes if n.op == "call_function"]
    found = []
    for role in ROLES:
        nodes = [n for name, n in named if name in role.ops and _fits(n, role)]
        if nodes:
            found.append(_choice(role, nodes, table, block_size))
    return found


def _fits(node: Node, role: Role) -> bool:
    return role.paged is None or role.paged == (node.kwargs.get("block_table") is not None)


def _choice(
    role: Role, nodes: list[Node], table: Mapping[str, tuple[Limit, ...]], block_size: int
) -> Choice:
    calls: dict[str, int] = {}
    for node in nodes:
        assert callable(node.target)
        name = op_name(node.target)
        calls[name] = calls.get(name, 0) + 1
    site = facts(nodes[0], block_size)
    others = {
        op: next((f"it takes {b.words}" for b in breaks(op, table.get(op, ()), site)), why)
        for op, why in role.others.items()
        if op not in calls
    }
    return Choice(role.name, calls, role.why, others)
