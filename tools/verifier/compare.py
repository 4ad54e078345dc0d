"""Compare one form of a model with another that was fed the same tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc8.ir.errors import KVC8Error
from kvc8.tools.verifier.forms import Run, Tokens
from kvc8.tools.verifier.gaps import Gap, codes, gap, next_token


@dataclass(frozen=True)
class CodesOfForm:
    """The int8 codes of a cache that differ, over all layers."""

    differ: int
    of: int
    by: tuple[int, int, int]  # how many differ by one, by two, and by more
    saturated: float  # the share of the form's codes at -128 or 127
    most: int  # the largest difference between two codes
    first: int | None  # the first layer with one; None where there is none
    # Those that differ though the floats they come from are equal bit for bit; None where an op
    # quantizes what it computes itself, so that nobody sees those floats.
    same_inputs: int | None


@dataclass(frozen=True)
class FormRow:
    """How a form differs from another; `codes` is None where its cache is float."""

    form: str
    against: str
    logits: Gap
    kl: float  # mean Kullback-Leibler divergence of the next token, in nats
    greedy: int  # calls whose greedy token agrees
    calls: int
    codes: CodesOfForm | None


@dataclass(frozen=True)
class LeftOut:
    """A form that cannot be made of this model."""

    form: str
    left_out: str  # why


def compare_or_leave_out(
    form: str, make: Callable[[], Run], against: str, base: Run, tokens: Tokens
) -> FormRow | LeftOut:
    """Make a form and compare it; one that kvc8 refuses to make is left out."""
    try:
        made = make()
    except KVC8Error as error:
        return LeftOut(form, str(error))
    return compare(form, made, against, base, tokens)


def compare(form: str, made: Run, against: str, base: Run, tokens: Tokens) -> FormRow:
    """Both ran the tokens; caches have the same names, in the order of the layers, or are none."""
    pairs = list(zip(made.logits, base.logits, strict=True))
    logits = gap(*(torch.cat([pair[i] for pair in pairs]) for i in (1, 0)))
    kl, same = zip(*(next_token(b[-1], a[-1]) for a, b in pairs), strict=True)
    quantized = [name for name, cache in made.caches.items() if cache.dtype is torch.int8]
    codes = _codes(made, base, tokens, quantized) if quantized else None
    return FormRow(form, against, logits, sum(kl) / len(kl), sum(same), len(pairs), codes)


def _codes(made: Run, base: Run, tokens: Tokens, names: Sequence[str]) -> CodesOfForm:
    """What the caches of some names hold: all, but for the scales of tokens."""
    written = {
        name: (_written(made.caches[name], tokens), _written(base.caches[name], tokens))
        for name in names
    }
    each = [codes(old, new) for new, old in written.values()]
    gaps = {name: (new.int() - old.int()).abs() for name, (new, old) in written.items()}
    wrong = [i // 2 for i, off in enumerate(gaps.values()) if off.any()]  # K and V of each layer
    one, two, more = (sum(found.by[i] for found in each) for i in range(3))
    of = sum(found.of for found in each)
    return CodesOfForm(
        differ=one + two + more,
        of=of,
        by=(one, two, more),
        saturated=sum(found.saturated * found.of for found in each) / of,
        most=max(int(off.max()) for off in gaps.values()),
        first=wrong[0] if wrong else None,
        same_inputs=_on_same(made, base, gaps),
    )


def _written(cache: Tensor, tokens: Tokens) -> Tensor:
    """The rows of a cache [N, S, H, D] in the order of the tokens, [tokens, H*D]."""
    return cache.flatten(0, 1)[tokens.slots].flatten(1)


def _on_same(made: Run, base: Run, gaps: Mapping[str, Tensor]) -> int | None:
    found = 0
    for name, off in gaps.items():
        a, b = (torch.cat(run.rows.get(name, [torch.empty(0)])) for run in (made, base))
        if not a.shape == b.shape == off.shape:  # a scale a token: no code is of one value alone
            return None
        found += int(((a == b) & (off > 0)).sum())
    return found
