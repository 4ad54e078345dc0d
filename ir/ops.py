"""The ops kvc8 adds to ATen. None writes to its arguments; each has a CPU reference.

A program therefore runs, and can be compared, at every stage before it is lowered to NPU ops.

The KV cache of a layer is two tensors `[N, S, H, D]`: N blocks of S tokens, H key/value heads of D
channels. Token p of a sequence lies at flat slot `table[p // S] * S + p % S`.
"""

import torch
from torch import Tensor

FEW_ROWS = 16  # below it, making floats of the weights takes longer than the product
# The most products of two int8 codes that an int32 holds whatever they are: one is at most
# (-128)**2 = 2**14, so 2**17 of them may reach 2**31, one more than the largest int32.
WIDEST = (2**31 - 1) // 2**14  # 131,071


@torch.library.custom_op("kvc8::cache_write", mutates_args=())
def _cache_write(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """The cache with row i of `rows` at flat slot `slots[i]`; slot -1 writes nothing.

    cache [N, S, H, D], rows [T, H, D] of the same dtype, slots int [T] in [-1, N*S).
    """
    new = cache.clone()
    real = slots >= 0
    new.flatten(0, 1)[slots[real].long()] = rows[real]
    return new


@_cache_write.register_fake
def _(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    torch._check(cache.dtype == rows.dtype, lambda: "rows and cache differ in dtype")
    torch._check(cache.dim() == 4, lambda: "a cache is [blocks, block_size, heads, head_dim]")
    torch._check(rows.shape[1:] == cache.shape[2:], lambda: "rows are not [T, heads, head_dim]")
    return torch.empty_like(cache)


@torch.library.custom_op("kvc8::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over its pages.

    q [T, Hq, D]; caches [N, S, H, D], H divides Hq; block_table int [B, M]; seq_lens int [B], the
    tokens of each sequence with the new ones; query_starts int [B + 1], where each sequence's rows
    begin in q. A row past the last start attends to nothing and gives zeros. `scale` multiplies
    the logits; with `window` w > 0 a query sees itself and the w - 1 tokens before it; `softcap`
    c > 0 makes the logits c*tanh(x/c); `sinks` [Hq] adds one logit a head that carries no value.
    Gives [T, Hq, D] in q's dtype, computed in float32, or in float64 where that is q's.
    """
    out = torch.zeros(*q.shape[:2], v_cache.shape[3], dtype=q.dtype)
    block, wide = k_cache.shape[1], torch.promote_types(q.dtype, torch.float32)
    for b, end in enumerate(seq_lens.tolist()):
        start, stop = query_starts[b : b + 2].tolist()
        if start == stop:
            continue
        pages = block_table[b, : -(-end // block)].long()
        k, v = (c[pages].flatten(0, 1)[:end].to(wide) for c in (k_cache, v_cache))
        mask = causal_mask(stop - start, end, window)
        out[start:stop] = attend(q[start:stop].to(wide), k, v, mask, scale, softcap, sinks)
    return out


@_paged_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    torch._check(q.shape[2] == k_cache.shape[3], lambda: "q and k_cache differ in head_dim")
    torch._check(q.shape[1] % k_cache.shape[2] == 0, lambda: "kv heads do not divide heads")
    return q.new_empty(*q.shape[:2], v_cache.shape[3])


def causal_mask(queries: int, keys: int, window: int = 0) -> Tensor:
    """Which of `keys` tokens each of the last `queries` of them sees: bool [queries, keys]."""
    at = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)[None]
    seen = key <= at
    return seen & (key > at - window) if window else seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v with grouped heads, in the dtype of q.

    q [T, Hq, D], k and v [L, H, D], mask bool [T, L]; gives [T, Hq, D].
    """
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (heads, groups)).permute(1, 2, 0, 3)  # [H, G, T, D]
    logits = grouped @ k.permute(1, 2, 0)[:, None] * scale  # [H, G, T, L]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(heads, groups, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = torch.softmax(logits, -1)[..., : k.shape[0]]
    out = weights @ v.permute(1, 0, 2)[:, None]  # [H, G, T, D]
    return out.permute(2, 0, 1, 3).flatten(1, 2)


@torch.library.custom_op("kvc8::quantize", mutates_args=())
def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """clamp(round(x/scale + zero), -128, 127) as int8, in float32, half to even.

    scale and zero are float32 and broadcast against the last dimensions of x. The producer's
    convention (msModelSlim, `quantized_weight_format.md`); without `zero` it is symmetric.
    """
    y = x.float() / scale
    if zero is not None:
        y = y + zero
    return y.round().clamp(-128, 127).to(torch.int8)


@_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    _check_scale(x, scale, zero)
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("kvc8::dequantize", mutates_args=())
def _dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q - zero)*scale in float32, then cast to dtype; the inverse of quantize."""
    y = q.float() if zero is None else q.float() - zero
    return (y * scale).to(dtype)


@_dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    torch._check(q.dtype == torch.int8, lambda: "q is not int8")
    _check_scale(q, scale, zero)
    return torch.empty_like(q, dtype=dtype)


def _check_scale(x: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    torch._check(scale.dtype == torch.float32, lambda: "scale is not float32")
    torch._check(scale.dim() <= x.dim(), lambda: "scale has more dimensions than x")
    last = x.shape[x.dim() - scale.dim() :]
    fits = all(s in (1, n) for s, n in zip(scale.shape, last, strict=True))
    torch._check(fits, lambda: "scale does not broadcast against the last dimensions of x")
    if zero is not None:
        torch._check(zero.dtype == torch.float32, lambda: "zero is not float32")
        torch._check(zero.shape == scale.shape, lambda: "zero and scale differ in shape")


@torch.library.custom_op("kvc8::quant_linear", mutates_args=())
def _quant_linear(
    x: Tensor, weight: Tensor, deq_scale: Tensor, quant_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x·weight^T + quant_bias)*deq_scale: exact in int32, then one float32 product, then cast.

    x int8 [..., K], weight int8 [O, K], deq_scale float32 [O], quant_bias int32 [O]; gives
    dtype [..., O]. K at most 131,071 (WIDEST), so that no sum of products can overflow; that it
    does not with quant_bias added is up to who makes that.
    """
    acc = _products(x.reshape(-1, x.shape[-1]), weight.t())
    if quant_bias is not None:
        acc = acc + quant_bias
    return (acc.float() * deq_scale).to(dtype).reshape(*x.shape[:-1], -1)


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """x·weight of int8 [R, K] and [K, O] as int32 [R, O], exact.

    Processors without int8 products are slow at them, and quick at floats. A float sum of whole
    numbers is exact while no partial sum needs more bits than it has: K * 128**2 is at most 2**24
    for K up to 1024, and far below 2**53 for any K that is allowed.
    """
    if len(x) < FEW_ROWS:
        return torch._int_mm(x, weight)
    wide = torch.float32 if x.shape[1] <= 1024 else torch.float64
    return (x.to(wide) @ weight.to(wide)).to(torch.int32)


@_quant_linear.register_fake
def _(
    x: Tensor, weight: Tensor, deq_scale: Tensor, quant_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    torch._check(x.dtype == weight.dtype == torch.int8, lambda: "x and weight are not both int8")
    torch._check(x.shape[-1] == weight.shape[1], lambda: "x and weight differ in width")
    torch._check(weight.shape[1] <= WIDEST, lambda: "an int32 sum this wide can overflow")
    torch._check(deq_scale.dtype == torch.float32, lambda: "deq_scale is not float32")
    torch._check(deq_scale.shape == weight.shape[:1], lambda: "deq_scale is not one an output")
    if quant_bias is not None:
        torch._check(quant_bias.dtype == torch.int32, lambda: "quant_bias is not int32")
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@torch.library.custom_op("kvc8::quantize_tokens", mutates_args=())
def _quantize_tokens(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row and its scale: s = max|row| / 127, round(row / s).

    x [..., K], multiplied by `smooth` [K] first where there is one; gives int8 [..., K] and float32
    [...], in float32, half to even. A row of zeros has the scale 0. (npu_dynamic_quant, with its
    smooth_scales; vllm-ascend quantization/methods/w8a8_dynamic.py.)
    """
    wide = x.float() if smooth is None else x.float() * smooth.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    codes = (wide / scale.masked_fill(scale == 0, 1)).round()
    return codes.clamp(-128, 127).to(torch.int8), scale.squeeze(-1)


@_quantize_tokens.register_fake
def _(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if smooth is not None:
        torch._check(smooth.shape == x.shape[-1:], lambda: "smooth is not one a channel of x")
        torch._check(smooth.dtype == x.dtype, lambda: "smooth and x differ in dtype")
    codes = torch.empty_like(x, dtype=torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("kvc8::dequantize_tokens", mutates_args=())
def _dequantize_tokens(
    q: Tensor, scale: Tensor, smooth: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """q*scale/smooth in float32, then cast to dtype; the inverse of quantize_tokens.

    q int8 [..., H, D] and scale float32 [..., 1, 1], of each token; smooth [H*D] as it was given.
    """
    y = q.float() * scale
    return (y if smooth is None else y / smooth.float().view(q.shape[-2:])).to(dtype)


@_dequantize_tokens.register_fake
def _(q: Tensor, scale: Tensor, smooth: Tensor | None, dtype: torch.dtype) -> Tensor:
    torch._check(q.dtype == torch.int8, lambda: "q is not int8")
    torch._check(scale.dtype == torch.float32, lambda: "scale is not float32")
    torch._check(scale.shape == (*q.shape[:-2], 1, 1), lambda: "scale is not one a token")
    if smooth is not None:
        width = q.shape[-2] * q.shape[-1]
        torch._check(smooth.shape == (width,), lambda: "smooth is not one a channel")
    return torch.empty_like(q, dtype=dtype)


@torch.library.custom_op("kvc8::dynamic_linear", mutates_args=())
def _dynamic_linear(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(x·weight^T)*weight_scale*scale + bias: exact in int32, then float32, then cast.

    x int8 [..., K] and scale float32 [...] of `quantize_tokens`; weight int8 [O, K], weight_scale
    float32 [O], bias float32 [O]; gives dtype [..., O]. K as in `quant_linear`.
    """
    acc = torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t()).reshape(*x.shape[:-1], -1)
    out = acc.float() * weight_scale * scale.unsqueeze(-1)
    return (out if bias is None else out + bias).to(dtype)


@_dynamic_linear.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(x.dtype == weight.dtype == torch.int8, lambda: "x and weight are not both int8")
    torch._check(x.shape[-1] == weight.shape[1], lambda: "x and weight differ in width")
    torch._check(weight.shape[1] <= WIDEST, lambda: "an int32 sum this wide can overflow")
    torch._check(scale.shape == x.shape[:-1], lambda: "scale is not one a row of x")
    for name, part in (("weight_scale", weight_scale), ("bias", bias)):
        if part is not None:
            torch._check(part.dtype == torch.float32, lambda name=name: f"{name} is not float32")
            fits = part.shape == weight.shape[:1]
            torch._check(fits, lambda name=name: f"{name} is not one an output")
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


cache_write = torch.ops.kvc8.cache_write.default
paged_attention = torch.ops.kvc8.paged_attention.default
quantize = torch.ops.kvc8.quantize.default
dequantize = torch.ops.kvc8.dequantize.default
quant_linear = torch.ops.kvc8.quant_linear.default
quantize_tokens = torch.ops.kvc8.quantize_tokens.default
dequantize_tokens = torch.ops.kvc8.dequantize_tokens.default
dynamic_linear = torch.ops.kvc8.dynamic_linear.default
