"""A program computed as an engine's own code computes it: what it writes to its cache, and reads.

What an engine does to numbers is not what a checkpoint means. A QUANTIZED program is taken as it
is, with scales that nobody repaired, and its quantizers, its int8 reads and its linears are
exchanged for the engine's. `s` and `z` are a scale and a zero point, T the dtype of the model:

                  vllm-ascend                               mindie
    cache write   round(x * (1/s) + z), each step in T      round(half(x / s) + 0)
    fresh prompt  sees its own K and V as floats            sees its own K and V as floats
    chunk         T(q) * s in T                             q * s in float32
    decode        q * s in float32, s in T                  q * s in float32
    windows       not looked at                             as the model has them
    linear input  round(x * (1/s) + z), 1/s in T            round(half(x / s) + z)
    linear        (x8 w8 + bias) * deq_scale; a float16 model's deq_scale is cut to 19 bits

vllm-ascend: attention_v1.py (AscendC8AttentionBackendImpl: _quantize_kv_to_int8,
_dequant_paged_kv_to_dense and three calls of npu_fused_infer_attention_score), the same in 0.23.0
and 182b75ea; ops/register_custom_ops.py for linears. The zero point is added and never taken off;
each card slices its heads out of the scales, which changes no number. MindIE: by MindIE-LLM 8b4871a
(layers/attention/kv_cache.py turns every zero point into 0) and ATB's document and kernel of
ELEWISE_QUANT_PER_CHANNEL. What is closed, the kernels of attention and matmul, is emulated as
documented (backends/npu/emulation); the rest of a layer is computed as transformers does, in T.
Nothing of this was tried on a device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.backends.npu.emulation.matmul import npu_trans_quant_param, unpack_scale
from kvc8.ir import ops
from kvc8.ir.program import Program, argument, is_call
from kvc8.tools.quantizer.engines import Engine


@dataclass(frozen=True)
class Arithmetic:
    """The functions that stand for ops: of the cache, by phase, and of linears."""

    write: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    chunk: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    input: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    windows: bool


def as_engine(program: Program, engine: Engine) -> dict[str, Program]:
    """Programs by phase (prefill, chunk, decode) that compute a QUANTIZED program as an engine.

    They run, and are no programs that verify accepts.
    """
    found = ARITHMETIC[engine]
    return {
        "prefill": _computed(program, found, None),
        "chunk": _computed(program, found, found.chunk),
        "decode": _computed(program, found, found.decode),
    }


def _computed(program: Program, found: Arithmetic, read: Callable[..., Tensor] | None) -> Program:
    """A copy with the engine's functions in place of ops; with no `read`, K and V as floats."""
    made = program.copy()
    for node in list(made.graph.nodes):
        if is_call(node, ops.quantize):
            to_cache = any(is_call(user, ops.cache_write) for user in node.users)
            node.target = found.write if to_cache else found.input
        elif is_call(node, ops.quant_linear):
            node.target = quant_linear
        elif is_call(node, torch.ops.aten.linear.default):
            node.target = linear
        elif is_call(node, ops.paged_attention) and not found.windows:
            node.target = _full_attention
        elif is_call(node, ops.dequantize):
            node.target = read or _fresh
            if not read:
                node.args = _rows(argument(node, 0))
    return made


def _rows(write: Node) -> tuple[Node, Node, Node]:
    """A written int8 cache, and the float rows and slots that were written to it."""
    return write, argument(argument(write, 1), 0), argument(write, 2)


def _fresh(written: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Pages that hold nothing but these rows, as they were before they were quantized."""
    empty = torch.zeros(written.shape, dtype=rows.dtype)
    pages: Tensor = ops.cache_write(empty, rows, slots)
    return pages


def _full_attention(*args: object, **kwargs: object) -> Tensor:
    """Attention without the window, soft cap and sinks that a model asks for."""
    found: Tensor = ops.paged_attention(*args[:7])
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A float linear: summed in float32 and rounded once, as a device does it."""
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), wide).to(x.dtype)


def quant_linear(
    x: Tensor, weight: Tensor, deq_scale: Tensor, quant_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """npu_quant_matmul: kvc8.quant_linear by the deq_scale that a device reads."""
    if dtype is torch.float16:
        deq_scale = unpack_scale(npu_trans_quant_param(deq_scale))
    found: Tensor = ops.quant_linear(x, weight, deq_scale, quant_bias, dtype)
    return found


def saturated(x: Tensor) -> Tensor:
    """Round half to even and clamp to int8."""
    return x.round().clamp(-128, 127).to(torch.int8)


def vllm_write(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Rows [T, H, D] to codes, every step in the dtype of x; scale and zero [H, D]."""
    offset = torch.zeros_like(scale) if zero is None else zero
    return saturated(x * (1.0 / scale.to(x.dtype)) + offset.to(x.dtype))


def vllm_chunk(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes to K or V of a chunk or a prefix hit, in the dtype of the model."""
    return q.to(dtype) * scale.to(dtype)


def vllm_decode(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes to what the attention op sees: antiquant scales in the dtype of the model."""
    return q.float() * scale.to(dtype).float()


def vllm_input(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """npu_quantize with div_mode=False: it multiplies, adds and rounds in float32."""
    offset = torch.zeros_like(scale) if zero is None else zero
    return saturated(x.float() * (1 / scale.to(x.dtype)).float() + offset)


def mindie_write(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Elewise quant: a quotient rounded to float16, and a zero point that has become 0."""
    return saturated((x.float() / scale.to(x.dtype).float()).half())


def mindie_read(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What PagedAttention with TYPE_DEQUANT_FUSION sees: float32 scales, and no zero point."""
    return q.float() * scale.to(dtype).float()


def mindie_input(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Elewise quant of a linear's input."""
    offset = torch.zeros_like(scale) if zero is None else zero
    return saturated((x.float() / scale.to(x.dtype).float()).half() + offset.half())


ARITHMETIC: Mapping[Engine, Arithmetic] = {
    "vllm-ascend": Arithmetic(vllm_write, vllm_chunk, vllm_decode, vllm_input, windows=False),
    "mindie": Arithmetic(mindie_write, mindie_read, mindie_read, mindie_input, windows=True),
}
