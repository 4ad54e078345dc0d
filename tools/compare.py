"""Compare one form of a model with another that was fed the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.tools.forms import Run, Tokens


@dataclass(frozen=True)
class Codes:
    """The int8 codes of a cache that differ, over all layers."""

    differ: int
    of: int
    most: int  # the largest difference between two codes
    first: int | None  # the first layer with one; None where there is none
    # Those that differ though the floats they come from are equal bit for bit; None where an op
    # quantizes what it computes itself, so that nobody sees those floats.
    same_inputs: int | None


@dataclass(frozen=True)
class Row:
    """How a form differs from another; `codes` is None where its cache is float."""

    form: str
    against: str
    logits: float  # largest absolute difference
    kl: float  # mean Kullback-Leibler divergence of the next token, in nats
    greedy: int  # calls whose greedy token agrees
    calls: int
    codes: Codes | None


def compare(form: str, made: Run, against: str, base: Run, tokens: Tokens) -> Row:
    """Both ran the tokens; caches have the same names, and come in the order of the layers."""
    pairs = list(zip(made.logits, base.logits, strict=True))
    gap = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    greedy = sum(bool(a[-1].argmax() == b[-1].argmax()) for a, b in pairs)
    quantized = all(cache.dtype is torch.int8 for cache in made.caches.values())
    codes = _codes(made, base, tokens) if quantized else None
    return Row(form, against, gap, _kl(pairs), greedy, len(pairs), codes)


def _codes(made: Run, base: Run, tokens: Tokens) -> Codes:
    gaps = {
        name: _written(made.caches[name].int() - base.caches[name].int(), tokens).abs()
        for name in base.caches
    }
    wrong = [i // 2 for i, gap in enumerate(gaps.values()) if gap.any()]  # K and V of each layer
    return Codes(
        differ=sum(int((gap > 0).sum()) for gap in gaps.values()),
        of=sum(gap.numel() for gap in gaps.values()),
        most=max(int(gap.max()) for gap in gaps.values()),
        first=wrong[0] if wrong else None,
        same_inputs=_on_same(made, base, gaps),
    )


def _written(cache: Tensor, tokens: Tokens) -> Tensor:
    """The rows of a cache [N, S, H, D] in the order of the tokens, [tokens, H*D]."""
    return cache.flatten(0, 1)[tokens.slots].flatten(1)


def _on_same(made: Run, base: Run, gaps: Mapping[str, Tensor]) -> int | None:
    found = 0
    for name, gap in gaps.items():
        a, b = (torch.cat(run.rows.get(name, [torch.empty(0)])) for run in (made, base))
        if a.shape != b.shape:
            return None
        found += int(((a == b) & (gap > 0)).sum())
    return found


def _kl(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean over the calls of KL(base || form) of the last row's next token."""
    made, base = (
        torch.stack([pair[i][-1].double() for pair in pairs]).log_softmax(-1) for i in (0, 1)
    )
    return float((base.exp() * (base - made)).sum(-1).mean())
