"""Attention as transformers' eager code computes it, in the model's own dtype, to the bit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.errors import ModelError
from kvc8.ir.run import Value
from kvc8.tools.quantizer.layers import attention_settings


def attend(call: Node, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    """Attention of a text over itself: q [T, Hq, D], k and v [T, H, D] in one dtype.

    The logits are rounded to it before they are scaled, the mask is added as its least number, and
    the weights are rounded to it before they meet v. Raises ModelError for sinks and soft caps.
    """
    q, k, v = (x for x in args[:3] if isinstance(x, Tensor))
    settings = attention_settings(args, kwargs)
    if settings.softcap or settings.sinks is not None:
        raise ModelError(
            f"{call.meta.get('origin')}",
            "its attention has sinks or a soft cap, which --recipe msmodelslim does not know",
            "use --recipe minmax",
        )
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
    logits = torch.matmul(q, _repeated(k, groups).transpose(2, 3)) * settings.scale
    seen = ops.causal_mask(q.shape[2], q.shape[2], settings.window)
    hidden = torch.zeros(seen.shape, dtype=q.dtype)
    logits = logits + hidden.masked_fill_(~seen, torch.finfo(q.dtype).min)
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, _repeated(v, groups)).transpose(1, 2).contiguous()[0]


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each head `groups` times, in memory: the kernels' results depend on how it lies."""
    one, heads, *rest = x.shape
    return x[:, :, None].expand(one, heads, groups, *rest).reshape(one, heads * groups, *rest)
