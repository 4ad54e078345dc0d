"""The eight tensors that quantize and dequantize K and V, in the form that each consumer wants.

From scale s and offset z, [kv_heads * head_dim] each, where q = clamp(round(x / s + z), -128, 127)
and x' = (q - z) * s, come {k,v}_{quant,dequant}_{scale,offset}. C is kv_heads * head_dim; "model"
is the dtype the model computes in. Who quantizes and who dequantizes are chosen apart:

    quant form        it computes  scale             offset            source
    page              x / s + z    s, stored [C]     z, stored [C]     the vendor's page
    atb               x / s + z    s, model [C]      z, int8 [C]       ATB's Elewise quant, also as
                                                                       _npu_quantize_per_tensor
    divide            x / s + z    s, float32 [C]    z, int32 [C]      npu_quantize, div_mode=True
    multiply          x * s' + z   1/s, model [C]    z, model [C]      npu_quantize, div_mode=False
    rope_quant_cache  x / s + z    s, float32 [N,D]  z, float32 [N,D]  npu_rope_quant_kvcache: its
                                                                       kernel divides, then adds

    dequant form      it computes  scale             offset            source
    page              (q - z) * s  s, stored [C]     z, stored [C]     the vendor's page
    atb               (q + o) * s  bits of s [C]     -z, int32 [C]     ATB's PagedAttention with
                                                                       TYPE_DEQUANT_FUSION
    fused_infer       (q + o) * s  s, model [C]      -z, model [C]     the antiquant arguments of
                                                                       npu_fused_infer_attention_score
    anti_quant        (q + o) * s  s, float32 [C]    -z, float32 [C]   npu_anti_quant

"bits of s": for float16 models int64, the bits of float32 s read as an int32; for bfloat16 models
float32 s itself. The attention kernels add their offset, the page and msModelSlim subtract it:
hence -z. MindIE passes z there, as the bits of a float, which is right for z = 0 only.

The forms are stated as expressions: `derive` makes them from tensors at once, and a pass writes
them into a program.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvc8.ir.errors import ModelError
from kvc8.ir.expression import Expression, cast, make, stored

QuantForm = Literal["page", "atb", "divide", "multiply", "rope_quant_cache"]
DequantForm = Literal["page", "atb", "fused_infer", "anti_quant"]


@dataclass(frozen=True)
class KVParams:
    """The eight tensors of one layer; see the module for their forms."""

    k_quant_scale: Tensor
    k_quant_offset: Tensor
    k_dequant_scale: Tensor
    k_dequant_offset: Tensor
    v_quant_scale: Tensor
    v_quant_offset: Tensor
    v_dequant_scale: Tensor
    v_dequant_offset: Tensor


@dataclass(frozen=True)
class Channels:
    """Scale and offset of the K or V of one layer by channel: [kv_heads * head_dim] both."""

    scale: Tensor
    offset: Tensor


def by_channel(scale: Tensor, offset: Tensor | None, width: int, where: str) -> Channels:
    """Spread stored scale and offset over `width` channels and check their values.

    Both hold `width` numbers or one; no offset means zeros. They keep their dtypes. Raises
    ModelError at `where` for a scale that is not finite and positive, an offset that is not a
    whole number, and any other length.
    """
    offset = torch.zeros_like(scale) if offset is None else offset
    for name, value in (("scale", scale), ("offset", offset)):
        if value.numel() not in (1, width):
            raise ModelError(
                where,
                f"the {name} holds {value.numel()} numbers for {width} channels",
                "use the config.json that the model was quantized with",
            )
    _check_scale(scale, where, "calibrate the model again")
    if not whole(offset):
        raise ModelError(
            where, "an offset is not a whole number from -256 to 256", "calibrate the model again"
        )
    return Channels(scale.reshape(-1).expand(width), offset.reshape(-1).expand(width))


def derive(
    k: Channels,
    v: Channels,
    *,
    quant: QuantForm,
    dequant: DequantForm,
    model_dtype: torch.dtype,
    head_dim: int,
    where: str,
) -> KVParams:
    """Derive the eight tensors for one who quantizes and one who dequantizes.

    `model_dtype` is float16 or bfloat16. Raises ModelError at `where` for a scale or offset that
    the form's dtype cannot hold.
    """
    if model_dtype not in (torch.float16, torch.bfloat16):
        raise ModelError(
            where,
            f"the model computes in {model_dtype} and an int8 KV cache wants float16 or bfloat16",
            "convert the model",
        )
    made: list[Tensor] = []
    for channels in (k, v):
        side = SideParams(
            stored("scale"), stored("zero"), channels.scale.dtype, channels.offset.dtype
        )
        made += _made(channels, quantizer(side, quant, model_dtype, head_dim), where)
        made += _made(channels, dequantizer(side, dequant, model_dtype), where)
    return KVParams(*made)


def heads_of_rank(kv_heads: int, rank: int, ranks: int) -> range:
    """Give the KV heads of tensor-parallel rank `rank` of `ranks`.

    Ranks share heads out evenly; where they outnumber the heads, each head goes to
    ranks / kv_heads neighbors. Raises ModelError where that does not come out even.
    """
    if ranks < 1 or (kv_heads % ranks and ranks % kv_heads):
        even = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise ModelError(
            f"tensor parallel over {ranks}",
            f"cannot share out {kv_heads} KV heads evenly",
            f"use {even} or a multiple of {kv_heads} ranks",
        )
    if not 0 <= rank < ranks:
        raise ModelError(
            f"tensor parallel over {ranks}",
            f"has no rank {rank}",
            f"use a rank from 0 to {ranks - 1}",
        )
    if ranks >= kv_heads:
        head = rank // (ranks // kv_heads)
        return range(head, head + 1)
    each = kv_heads // ranks
    return range(rank * each, (rank + 1) * each)


def shard(value: Tensor, kv_heads: int, rank: int, ranks: int) -> Tensor:
    """Slice whole heads of rank `rank` out of the last dimension, kv_heads * head_dim; a view.

    Raises ModelError as `heads_of_rank` does, and where that dimension is not whole heads.
    """
    head_dim, rest = divmod(value.shape[-1], kv_heads)
    if rest:
        raise ModelError(
            f"tensor parallel over {ranks}",
            f"{value.shape[-1]} channels are not {kv_heads} whole heads",
            "check num_key_value_heads in config.json",
        )
    heads = heads_of_rank(kv_heads, rank, ranks)
    return value[..., heads.start * head_dim : heads.stop * head_dim]


def shard_channels(channels: Channels, kv_heads: int, rank: int, ranks: int) -> Channels:
    """Slice scale and offset as `shard` does."""
    scale, offset = channels.scale, channels.offset
    return Channels(shard(scale, kv_heads, rank, ranks), shard(offset, kv_heads, rank, ranks))


@dataclass(frozen=True)
class SideParams:
    """What the scale and the zero point of a K or V are made of, [C] each, and their dtypes."""

    scale: Expression
    zero: Expression
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype

    def scale_as(self, dtype: torch.dtype) -> Expression:
        """The scale in a dtype."""
        return _as(self.scale, self.scale_dtype, dtype)

    def zero_as(self, dtype: torch.dtype) -> Expression:
        """The zero point in a dtype."""
        return _as(self.zero, self.zero_dtype, dtype)


def _as(expression: Expression, has: torch.dtype, dtype: torch.dtype) -> Expression:
    return expression if has is dtype else cast(expression, dtype)


def quantizer(
    side: SideParams, form: QuantForm, model: torch.dtype, head_dim: int
) -> tuple[Expression, Expression]:
    """Scale and offset of one who quantizes; `model` is the dtype the model computes in."""
    match form:
        case "page":
            return side.scale, side.zero
        case "atb":
            return side.scale_as(model), side.zero_as(torch.int8)
        case "divide":
            return side.scale_as(torch.float32), side.zero_as(torch.int32)
        case "multiply":
            inverse = Expression("reciprocal", (side.scale_as(torch.float32),))
            return _as(inverse, torch.float32, model), side.zero_as(model)
        case "rope_quant_cache":
            heads = (-1, head_dim)
            both = side.scale_as(torch.float32), side.zero_as(torch.float32)
            return Expression("reshape", (both[0], heads)), Expression("reshape", (both[1], heads))


def dequantizer(
    side: SideParams, form: DequantForm, model: torch.dtype
) -> tuple[Expression, Expression]:
    """Scale and offset of one who dequantizes; `model` is the dtype the model computes in."""
    match form:
        case "page":
            return side.scale, side.zero
        case "atb":
            wide = side.scale_as(torch.float32)
            packed = Expression("int_bits", (wide,)) if model is torch.float16 else wide
            return packed, _negated(side)
        case "fused_infer":
            return side.scale_as(model), cast(_negated(side), model)
        case "anti_quant":
            return side.scale_as(torch.float32), cast(_negated(side), torch.float32)


def _negated(side: SideParams) -> Expression:
    """-z in int32: float -0.0 is not the zero that runtimes compare with bit by bit."""
    return Expression("neg", (side.zero_as(torch.int32),))


def _made(
    side: Channels, expressions: tuple[Expression, Expression], where: str
) -> tuple[Tensor, Tensor]:
    """Make scale and offset, and check that their dtypes hold them."""
    given = {"scale": side.scale, "zero": side.offset}
    scale, offset = (make(expression, given.__getitem__) for expression in expressions)
    dtype = str(scale.dtype)
    _check_scale(scale, where, f"it does not fit {dtype}: choose a form that keeps float32 scales")
    if offset.dtype is torch.int8:
        _check_int8(side.offset, where)
    return scale, offset


def _check_scale(scale: Tensor, where: str, remedy: str) -> None:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ModelError(where, "a scale is not a finite positive number", remedy)


def _check_int8(offset: Tensor, where: str) -> None:
    wide = offset.to(torch.int32)
    if bool((wide.abs() > 128).any() or (wide == 128).any()):
        raise ModelError(
            where, "an offset does not fit int8", "choose a form that keeps wider offsets"
        )


def whole(offset: Tensor) -> bool:
    """Whether offsets are codes: whole numbers, not far outside of int8."""
    wide = offset.float()
    return bool((wide == wide.round()).all() and wide.abs().max() <= 256)  # no NaN passes this
