"""What differs between versions of vLLM; nothing else in kvc8 asks which one it is.

Run with vLLM 0.32 on a CPU. Written from the sources, and not run: vLLM 0.23, which asks a backend
for the shape of a layer's cache, and vLLM-Ascend 0.23, which keeps K and V apart.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.models import config as model_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvc8.backends.runtime.kv_layout import Cache


def register(architecture: str, model: str, config: str) -> None:
    """Register a model and what checks vLLM's configuration for it, each as "module:name"."""
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, model)
    model_configs.MODELS_CONFIG_MAP[architecture] = _imported(config)


def _imported(name: str) -> Any:
    from importlib import import_module

    module, _, item = name.partition(":")
    return getattr(import_module(module), item)


def set_block_size(cache_config: Any, block_size: int) -> int:
    """The tokens a block of vLLM's has: those given, or `block_size` where none were."""
    if not cache_config.user_specified_block_size:
        cache_config.block_size = block_size
        cache_config.user_specified_block_size = True  # or a platform puts its own
    found: int = cache_config.block_size
    return found


def cache_spec(k: Cache, v: Cache, block_size: int) -> FullAttentionSpec:
    """What vLLM must know of a layer's caches, which are of one size.

    A page is two planes, K and then V, of `block_size` tokens each.
    """
    planes = {"num_head_slots": 2, "state_content_bytes": k.bytes_per_token}
    known = {field.name for field in fields(FullAttentionSpec)}
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=k.heads,
        head_size=k.head_dim,
        dtype=k.dtype,
        **(planes if planes.keys() <= known else {}),  # 0.23: [2, blocks, block_size, ...]
    )


def layouts() -> tuple[Any, ...]:
    """How a layer's cache may lie: each plane in one piece."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return (KVCacheLayout.LHBNC,)


def planes(bound: Any) -> tuple[Tensor, ...]:
    """K and V of a layer, blocks first, out of what vLLM bound to it; nothing out of no memory."""
    if isinstance(bound, tuple | list):  # vLLM-Ascend
        return tuple(bound)
    if not bound.numel():
        return ()
    if bound.ndim == 4:  # [blocks, 2, block_size, bytes of a token]
        return bound[:, 0], bound[:, 1]
    return bound[0], bound[1]  # 0.23: what get_kv_cache_shape said


def host_lengths(metadata: Any) -> Tensor:
    """The tokens of each sequence, int32 [B] on the host."""
    found = getattr(metadata, "seq_lens_cpu_upper_bound", None)
    if found is None:
        found = getattr(metadata, "seq_lens_cpu", None)
    assert isinstance(found, torch.Tensor)
    return found
