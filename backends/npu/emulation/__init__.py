"""NPU ops computed on a CPU as their documents have it: not verified on a device."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

import kvc8.ir.npu  # noqa: F401  declares the ops whose kernels these are
from kvc8.backends.npu.emulation import (
    activation,
    attention,
    cache,
    matmul,
    mixture,
    norm,
    paged_attention,
    quantization,
    rope,
)


def _kernels() -> dict[str, Callable[..., Any]]:
    return {
        "npu::npu_quantize": quantization.npu_quantize,
        "npu::npu_dynamic_quant": quantization.npu_dynamic_quant,
        "npu::npu_anti_quant": quantization.npu_anti_quant,
        "npu::npu_trans_quant_param": matmul.npu_trans_quant_param,
        "npu::npu_quant_matmul": matmul.npu_quant_matmul,
        "npu::npu_dequant_bias": matmul.npu_dequant_bias,
        "npu::npu_scatter_pa_kv_cache": cache.npu_scatter_pa_kv_cache,
        "npu::npu_scatter_pa_kv_cache_functional": cache.npu_scatter_pa_kv_cache_functional,
        "npu::npu_scatter_nd_update_": cache.npu_scatter_nd_update_,
        "npu::npu_quant_scatter_": cache.npu_quant_scatter_,
        "npu::npu_fused_infer_attention_score": attention.npu_fused_infer_attention_score,
        "npu::npu_incre_flash_attention": attention.npu_incre_flash_attention,
        "npu::npu_rms_norm": norm.npu_rms_norm,
        "npu::npu_add_rms_norm": norm.npu_add_rms_norm,
        "npu::npu_rms_norm_quant": norm.npu_rms_norm_quant,
        "npu::npu_add_rms_norm_quant": norm.npu_add_rms_norm_quant,
        "npu::npu_rotary_mul": rope.npu_rotary_mul,
        "npu::npu_apply_rotary_pos_emb": rope.npu_apply_rotary_pos_emb,
        "npu::npu_rope_quant_kvcache": rope.npu_rope_quant_kvcache,
        "npu::npu_dequant_rope_quant_kvcache": rope.npu_dequant_rope_quant_kvcache,
        "npu::npu_qkv_rms_norm_rope_cache": rope.npu_qkv_rms_norm_rope_cache,
        "npu::npu_swiglu": activation.npu_swiglu,
        "npu::npu_swiglu_quant": activation.npu_swiglu_quant,
        "npu::npu_dequant_swiglu_quant": activation.npu_dequant_swiglu_quant,
        "npu::npu_geglu": activation.npu_geglu,
        "npu::npu_moe_gating_top_k_softmax": mixture.npu_moe_gating_top_k_softmax,
        "npu::npu_moe_gating_top_k": mixture.npu_moe_gating_top_k,
        "npu::npu_moe_init_routing_v2": mixture.npu_moe_init_routing_v2,
        "npu::npu_grouped_matmul": mixture.npu_grouped_matmul,
        "npu::npu_moe_token_unpermute": mixture.npu_moe_token_unpermute,
        "atb::_npu_reshape_and_cache": cache.npu_reshape_and_cache,
        "atb::_npu_paged_attention": paged_attention.npu_paged_attention,
        "atb::_npu_paged_attention_quant": paged_attention.npu_paged_attention_quant,
        "atb::_npu_quantize_per_tensor": quantization.npu_quantize_per_tensor,
    }


def _register(libraries: dict[str, torch.library.Library]) -> dict[object, Callable[..., Any]]:
    """Give PyTorch the kernels that it has none for; which these are, by op."""
    registered: dict[object, Callable[..., Any]] = {}
    for qualified, kernel in _kernels().items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"):
            namespace, name = qualified.split("::")
            libraries[namespace].impl(name, kernel, "CPU")
            registered[getattr(getattr(torch.ops, namespace), name).default] = kernel
    return registered


# Of PyTorch's own ops those that a program is full of: two thirds of such a call is to find it.
_DIRECT: Mapping[object, Callable[..., Any]] = MappingProxyType(
    {
        torch.ops.aten.reshape.default: torch.reshape,
        torch.ops.aten.flatten.using_ints: torch.flatten,
        torch.ops.aten.unsqueeze.default: torch.unsqueeze,
        torch.ops.aten.linear.default: torch.nn.functional.linear,
        torch.ops.aten.sym_size.int: lambda x, dim: x.shape[dim],
    }
)
# Kernels live as long as the Library objects do.
_NPU = torch.library.Library("npu", "IMPL")
_ATB = torch.library.Library("atb", "IMPL")
# What computes an op on a CPU, for who calls it without PyTorch's dispatcher.
KERNELS = MappingProxyType({**_register({"npu": _NPU, "atb": _ATB}), **_DIRECT})


def module_of(op: str) -> str:
    """The file that emulates an op, from the top of the repository; "" where none does."""
    found = (k for name, k in _kernels().items() if name.partition("::")[2] == op)
    kernel = next(found, None)
    if kernel is None:
        return ""
    return f"{kernel.__module__.removeprefix('kvc8.').replace('.', '/')}.py"
