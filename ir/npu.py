"""The Ascend NPU ops that programs may call, declared exactly as torch_npu 2.13.0 declares them.

The schemas are rows of npu_schemas.txt, defined where the dispatcher does not have them yet, so a
machine with the real torch_npu imports that first and keeps its own. Every op gets a shape rule
where it has none (npu_shapes.py). Nothing here computes: kvc8.backends.npu does, on a CPU.

Two ops, npu_rope_quant_kvcache and npu_dequant_rope_quant_kvcache, write to their caches although
their schemas do not say so; they return those same caches.
"""

from importlib.resources import files
from types import MappingProxyType

import torch

from kvc8.ir.npu_shapes import SHAPE_RULES

SCHEMAS = tuple(
    row
    for row in files("kvc8.ir").joinpath("npu_schemas.txt").read_text().splitlines()
    if not row.startswith("#")
)
# The number by which an op's argument names a dtype.
SCALAR_TYPES = MappingProxyType(
    {
        **{torch.int8: 1, torch.int32: 3},
        **{torch.float16: 5, torch.float32: 6, torch.bfloat16: 15},
    }
)


def _declare(libraries: dict[str, torch.library.Library]) -> None:
    for schema in SCHEMAS:
        qualified = schema.partition("(")[0]
        namespace, name = qualified.split("::")
        if not hasattr(getattr(torch.ops, namespace), name):
            libraries[namespace].define(schema.removeprefix(f"{namespace}::"))
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta"):
            torch.library.register_fake(qualified, SHAPE_RULES[name], lib=libraries[namespace])


# What is defined lives as long as the Library objects do.
_NPU = torch.library.Library("npu", "FRAGMENT")
_ATB = torch.library.Library("atb", "FRAGMENT")
_declare({"npu": _NPU, "atb": _ATB})

npu_quantize = torch.ops.npu.npu_quantize.default
npu_dynamic_quant = torch.ops.npu.npu_dynamic_quant.default
npu_quant_matmul = torch.ops.npu.npu_quant_matmul.default
npu_dequant_bias = torch.ops.npu.npu_dequant_bias.default
npu_trans_quant_param = torch.ops.npu.npu_trans_quant_param.default
npu_anti_quant = torch.ops.npu.npu_anti_quant.default
npu_scatter_pa_kv_cache = torch.ops.npu.npu_scatter_pa_kv_cache.default
npu_scatter_pa_kv_cache_functional = torch.ops.npu.npu_scatter_pa_kv_cache_functional.default
npu_scatter_nd_update_ = torch.ops.npu.npu_scatter_nd_update_.default
npu_quant_scatter_ = torch.ops.npu.npu_quant_scatter_.default
npu_fused_infer_attention_score = torch.ops.npu.npu_fused_infer_attention_score.default
npu_incre_flash_attention = torch.ops.npu.npu_incre_flash_attention.default
npu_rms_norm = torch.ops.npu.npu_rms_norm.default
npu_add_rms_norm = torch.ops.npu.npu_add_rms_norm.default
npu_rms_norm_quant = torch.ops.npu.npu_rms_norm_quant.default
npu_add_rms_norm_quant = torch.ops.npu.npu_add_rms_norm_quant.default
npu_rotary_mul = torch.ops.npu.npu_rotary_mul.default
npu_apply_rotary_pos_emb = torch.ops.npu.npu_apply_rotary_pos_emb.default
npu_rope_quant_kvcache = torch.ops.npu.npu_rope_quant_kvcache.default
npu_dequant_rope_quant_kvcache = torch.ops.npu.npu_dequant_rope_quant_kvcache.default
npu_qkv_rms_norm_rope_cache = torch.ops.npu.npu_qkv_rms_norm_rope_cache.default
npu_swiglu = torch.ops.npu.npu_swiglu.default
npu_swiglu_quant = torch.ops.npu.npu_swiglu_quant.default
npu_dequant_swiglu_quant = torch.ops.npu.npu_dequant_swiglu_quant.default
npu_geglu = torch.ops.npu.npu_geglu.default
npu_moe_gating_top_k_softmax = torch.ops.npu.npu_moe_gating_top_k_softmax.default
npu_moe_gating_top_k = torch.ops.npu.npu_moe_gating_top_k.default
npu_moe_init_routing_v2 = torch.ops.npu.npu_moe_init_routing_v2.default
npu_grouped_matmul = torch.ops.npu.npu_grouped_matmul.default
npu_moe_token_unpermute = torch.ops.npu.npu_moe_token_unpermute.default
atb_reshape_and_cache = torch.ops.atb._npu_reshape_and_cache.default
atb_paged_attention = torch.ops.atb._npu_paged_attention.default
atb_paged_attention_quant = torch.ops.atb._npu_paged_attention_quant.default
atb_quantize_per_tensor = torch.ops.atb._npu_quantize_per_tensor.default

# The most inputs or outputs of an npu_quant_matmul. The backend's legality table has it by this
# name, with its source; a pass that widens a product keeps to it.
WIDEST_QUANT_MATMUL = 65_535

# Positions of the caches that an op writes to without its schema saying so.
UNSAID_WRITES = MappingProxyType(
    {npu_rope_quant_kvcache: (3, 4), npu_dequant_rope_quant_kvcache: (3, 4)}
)
