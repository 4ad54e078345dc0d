"""How far apart two right answers of a call may lie, derived from where its op rounds.

Both compute one formula and round to half precision at the places that documents name; in float32
they may add in another order. With u = 2**-24 and n float32 roundings on the way, they come to a
rounding with values that differ by 2*n*u, relatively; a half-precision value of p bits is at most
2**p steps of its own, so a step lies between the two once in 1/(2*n*u*2**p) values, spread evenly:

    share  <=  2*n*u * (roundings*2**p + 256)

The 256 is of int8 codes, a sum of two terms of up to 128 steps each. A value is off by one step of
the dtype a rounding, and a code by what as many steps of a value of 128 are, but one at least.

Attention over int8 pages splits what it multiplies into int8 parts, two or more, whose remainder is
2**-16 of the largest (1/127/254/2). With scores off by d, weights are off by exp(2*d) - 1 and their
own rounding, and the result by as much of the largest value, and by its own rounding:

    d      =  scale * (D*2*u*|q|_2*|k|_2  +  2**-16*max|q|*|k|_1)        the second over int8 only
    reach  =  max|v| * (exp(2*d) - 1 + 2*eps + keys*2**-16)              the last over int8 only
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, expm1, log, sqrt
from typing import Any

import torch
from torch import Tensor

FLOAT32, SPLIT = 2.0**-24, 2.0**-16
ELEMENTARY = 16  # of an op beside its sum; the longest, npu_dequant_swiglu_quant, has 13
BITS = {torch.float16: 11, torch.bfloat16: 8}
SUMMED = {  # of squares, so that nothing cancels, and the root halves what they are off by
    "npu_rms_norm": "input", "npu_add_rms_norm": "x1", "npu_rms_norm_quant": "x",
    "npu_add_rms_norm_quant": "x1", "npu_qkv_rms_norm_rope_cache": "q_gamma",
}  # fmt: skip
ROUNDINGS = {  # if several: after x*rstd, *gamma and +beta; after two products and their sum; gelu
    "npu_add_rms_norm_quant": 3, "npu_rotary_mul": 3, "npu_apply_rotary_pos_emb": 3,
    "npu_rope_quant_kvcache": 3, "npu_dequant_rope_quant_kvcache": 4,
    "npu_geglu": 2,
}  # fmt: skip
ATTENTION = (
    "npu_fused_infer_attention_score", "npu_incre_flash_attention", "_npu_paged_attention",
    "_npu_paged_attention_quant",
)  # fmt: skip
SURE = 1e-6  # how often more values than `at_most` differ by chance


@dataclass(frozen=True)
class Within:
    """What may lie between two right answers."""

    steps: int = 1  # of a float dtype, of the largest value
    codes: int = 1
    reach: float = 0.0  # of floats, if not 0 in place of steps
    share: float = 0.0  # of the values that differ at all, on average

    def at_most(self, values: int) -> int:
        """How many of so many values may differ: more do once in 1/SURE (Bernstein's bound)."""
        mean, t = self.share * values, -log(SURE)
        return int(mean + t / 3 + sqrt(t * t / 9 + 2 * t * mean))


def within(op: str, values: Mapping[str, Any]) -> Within:
    """What may lie between two right answers of a call with these arguments."""
    roundings = ROUNDINGS.get(op, 1) - (op == "npu_add_rms_norm_quant" and "beta" not in values)
    bits = min((BITS[x.dtype] for x in _tensors(values) if x.dtype in BITS), default=24)
    terms = ELEMENTARY + (values[SUMMED[op]].shape[-1] / 2 if op in SUMMED else 0)
    share = 2 * terms * FLOAT32 * (roundings * 2.0**bits + 256)
    codes = max(1, ceil(128 * 2.0 ** (1 - bits) * roundings))
    return Within(roundings, codes, _reach(values, bits) if op in ATTENTION else 0.0, share)


def _tensors(values: Mapping[str, Any]) -> list[Tensor]:
    return [x for x in values.values() if isinstance(x, Tensor)]


def _reach(values: Mapping[str, Any], bits: int) -> float:
    """See the module."""
    query, key, value = (
        _first(values, name, f"{name}_cache") for name in ("query", "key", "value")
    )
    wide = query.ndim == 3 and values.get("input_layout") == "BSH"
    dim = query.shape[-1] // (int(values["num_heads"]) if wide else 1)
    split = SPLIT if key.dtype is torch.int8 else 0.0
    q, k, v = (
        query.reshape(-1, dim).double(),
        _rows(key, "key", values, dim),
        _rows(value, "value", values, dim),
    )
    sums = dim * 2 * FLOAT32 * float(q.norm(dim=1).max()) * float(k.norm(dim=1).max())
    remainder = split * float(q.abs().max()) * float(k.sum(1).max())
    scale = float(values.get("scale", values.get("scale_value", 1.0)))
    weights = expm1(2 * scale * (sums + remainder)) + 2 * 2.0 ** (1 - bits)
    return float(v.max()) * (weights + _keys(values, len(k)) * split)


def _keys(values: Mapping[str, Any], most: int) -> int:
    """The tokens of the longest sequence."""
    names = ("actual_seq_lengths_kv", "actual_seq_lengths", "context_lens")
    lengths = next((values[name] for name in names if values.get(name) is not None), [most])
    return max(lengths.tolist() if isinstance(lengths, Tensor) else lengths)


def _first(values: Mapping[str, Any], *names: str) -> Tensor:
    found = next(values[name] for name in names if name in values)
    tensor: Tensor = found[0] if isinstance(found, list | tuple) else found
    return tensor


def _rows(cache: Tensor, name: str, values: Mapping[str, Any], dim: int) -> Tensor:
    """At most the absolute values of each row of a head [.., D]; pages ND or NZ."""
    if cache.ndim == 5:
        cache = cache.permute(0, 1, 3, 2, 4)
    rows = cache.reshape(-1, dim).double().abs()
    if cache.dtype is not torch.int8:
        return rows
    scales, offsets = (
        [values[n] for n in (f"{name}_antiquant_{what}", f"antiquant_{what}") if n in values]
        for what in ("scale", "offset")
    )
    scales += [values[n] for n in (f"{name[0]}_descale",) if n in values]
    offset = max((float(x.abs().max()) for x in offsets if x is not None), default=0.0)
    scale = max((float(_floats(x).abs().max()) for x in scales if x is not None), default=1.0)
    return (rows + offset) * scale


def _floats(scale: Tensor) -> Tensor:
    """A scale, or the float32 whose bits an int64 has."""
    return scale.to(torch.int32).view(torch.float32) if scale.dtype is torch.int64 else scale
