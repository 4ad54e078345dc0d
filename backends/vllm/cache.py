"""The KV cache as vLLM sees it: a stand-in for each layer, and how a step's rows lie in the blocks.

A page of a layer is two planes, K and V, of a block's tokens each; a plane of all pages lies in one
piece, so that kvc8 gets the caches of the shapes that its programs have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

from kvc8.backends.runtime.kv_layout import Cache, KVLayout
from kvc8.backends.vllm import versions
from kvc8.ir.errors import TargetError


@dataclass(frozen=True)
class StepPlaces:
    """Where the rows of a step lie. The lists are on the host, the tensors on the device."""

    counts: Sequence[int]  # rows of each sequence
    lengths: Sequence[int]  # its tokens, the new ones included
    tables: Tensor  # i32[B, M], its blocks
    slots: Tensor  # i32[T], where each row goes


class StepBuilder(AttentionMetadataBuilder[StepPlaces]):  # type: ignore[misc]  # vLLM ships no types here
    """Makes a `StepPlaces` of each step, once for all layers."""

    # Sequences of one token go first, then those that have a past, then fresh prompts: each
    # program's rows lie together.
    reorder_batch_threshold = 1

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, **_: Any) -> StepPlaces:
        """The step that vLLM's metadata describes."""
        found = common_attn_metadata
        count = found.num_reqs
        starts = found.query_start_loc_cpu[: count + 1]
        return StepPlaces(
            counts=starts.diff().tolist(),
            lengths=versions.host_lengths(found)[:count].tolist(),
            tables=found.block_table_tensor[:count],
            slots=found.slot_mapping.int(),
        )


class InsideBackend(AttentionBackend):  # type: ignore[misc]  # as above
    """What vLLM asks of attention, which is inside of the compiled programs."""

    @staticmethod
    def get_name() -> str:
        """A name of its own."""
        return "KVC8"

    @staticmethod
    def get_impl_cls() -> type:
        """What nobody makes an instance of."""
        found: type = AttentionImpl
        return found

    @staticmethod
    def get_builder_cls() -> type:
        """What describes a step."""
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """How a layer's cache may lie."""
        return versions.layouts()

    @staticmethod
    def get_kv_cache_shape(
        blocks: int, block_size: int, heads: int, head_dim: int, *_: Any, **__: Any
    ) -> tuple[int, ...]:
        """The shape of a layer's cache in versions that ask for one."""
        return 2, blocks, block_size, heads, head_dim


class CacheLayer(nn.Module, AttentionLayerBase):  # type: ignore[misc]  # as above
    """Stands for K and V of one layer, and computes nothing."""

    def __init__(self, k: Cache, v: Cache, block_size: int) -> None:
        super().__init__()
        self.both, self.block_size = (k, v), block_size
        self.caches: tuple[Tensor, ...] = ()
        self._bound: Any = None

    def get_attn_backend(self) -> type:
        """What describes a step."""
        return InsideBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """What a page of this layer takes."""
        return versions.cache_spec(*self.both, self.block_size)

    def bind_kv_cache(self, kv_cache: Any) -> None:
        """Take the memory that vLLM gives."""
        self.kv_cache = kv_cache

    @property
    def kv_cache(self) -> Any:
        """What vLLM bound."""
        return self._bound

    @kv_cache.setter
    def kv_cache(self, bound: Any) -> None:
        self._bound = bound
        pairs = zip(self.both, versions.planes(bound), strict=False)  # no plane at a shutdown
        self.caches = tuple(x.view(cache.shape(len(x), self.block_size)) for cache, x in pairs)


def layers_of(layout: KVLayout, block_size: int) -> list[CacheLayer]:
    """The layers of a program. Raises TargetError for one that vLLM has no page for."""
    if any(cache.format == "steps" for cache in layout.caches):
        what = "has a scale for each token, and a page of vLLM has no room for those"
        raise TargetError("the cache", what, "use kvc8-run, or compile with --kv-scales-by channel")
    found = []
    pairs = zip(layout.caches[::2], layout.caches[1::2], strict=True)
    for i, (k, v) in enumerate(pairs):
        if (k.bytes_per_token, k.dtype) != (v.bytes_per_token, v.dtype):
            what = f"takes {k.bytes_per_token} bytes a token for K and {v.bytes_per_token} for V"
            raise TargetError(f"layer {i}", f"{what}, and a page of vLLM halves", "use kvc8-run")
        found.append(CacheLayer(k, v, block_size))
    return found
