"""Balance a norm against the linears that read it, where the model could not be rotated.

A norm's output may have channels far larger than the others. Divided by s in the norm's weight and
multiplied by s in what the linears take, the model computes what it did (SmoothQuant, Xiao et al.
2023):

    norm      (w + c) / s - c                   c: 1 where the norm multiplies by 1 + w, else 0
    linears   W diag(s)                         s = max|x|^a / max|W|^(1 - a), per channel

The new w is stored in the model's dtype, and s is then what that rounding made of it. A rotated
model's norms have been folded into their linears, and are left alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir.checkpoint.w8a8 import Range, input_params
from kvc8.ir.program import Program, argument, is_call
from kvc8.tools.quantizer.choices import clipped
from kvc8.tools.quantizer.sites import LinearSite
from kvc8.tools.quantizer.transforms.roles import Norm, NotTurned, Roles

ATEN = torch.ops.aten
POWERS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def norms(
    program: Program, chosen: Iterable[LinearSite], read: Callable[[str], Tensor]
) -> dict[Node, Norm]:
    """The norms to balance, by the value that they give; `read` gives stored tensors.

    All that reads such a value are linears of `chosen`, and channels do not all have one weight.
    """
    linears = {site.linear: site.source for site in chosen}
    found = {}
    for source in dict.fromkeys(linears.values()):
        norm = _norm_of(program, source) if set(source.users) <= set(linears) else None
        if norm and bool((read(norm.name) != read(norm.name)[0]).any()):
            found[source] = norm
    return found


def _norm_of(program: Program, source: Node) -> Norm | None:
    """The stored norm that a value is scaled by, and by nothing else after it."""
    while is_call(source, ATEN.to.dtype, ATEN.type_as.default):
        source = argument(source, 0)
        if len(source.users) > 1:
            return None
    if not is_call(source, ATEN.mul.Tensor):
        return None
    for factor in source.all_input_nodes:
        roles = Roles(program)
        try:
            found = roles.norm(source, factor)
            roles.check()
        except NotTurned:
            continue
        return found
    return None


def balance(
    stored: Tensor, plus: float, reach: Tensor, sample: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The norm's new weight, and the s [C] that it divides by.

    `stored` [C] is the old weight, `reach` [C] the largest |x|, `sample` [rows, C] some x; s is the
    one of `POWERS` that loses least of what the linears give of the sample.
    """
    wide = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    wanted = [sample @ weight.t() for weight in weights]
    found = [_scales(stored, plus, reach, wide, power) for power in POWERS]
    errors = [_error(sample, weights, wanted, s) for _, s in found]
    return found[min(range(len(found)), key=errors.__getitem__)]


def _scales(
    stored: Tensor, plus: float, reach: Tensor, wide: Tensor, power: float
) -> tuple[Tensor, Tensor]:
    least = torch.finfo(torch.float32).tiny
    s = (reach.clamp(min=1e-5) ** power) / (wide.clamp(min=1e-5) ** (1 - power))
    old = stored.float() + plus
    new = (old / (s / s.log().mean().exp()) - plus).to(stored.dtype)
    given = new.float() + plus
    # A channel whose weight is zero, or becomes so by rounding, keeps what it had.
    dead = (given.abs() <= least) | (old.abs() <= least)
    return torch.where(dead, stored, new), torch.where(dead, torch.ones_like(s), old / given)


def _error(sample: Tensor, weights: Sequence[Tensor], wanted: Sequence[Tensor], s: Tensor) -> float:
    x = sample / s
    low, high = (float(end) for end in torch.aminmax(x))
    scale, offset = input_params(clipped(Range(low, high), x), torch.float32)
    x = (torch.round(x / scale + offset).clamp(-128, 127) - offset) * scale
    total = 0.0
    for weight, y in zip(weights, wanted, strict=True):
        scaled = weight * s
        step = scaled.abs().amax(1, keepdim=True) / 127
        rounded = torch.round(scaled / step.clamp(min=1e-12)) * step
        total += float((x @ rounded.t() - y).square().mean())
    return total


def names(found: Mapping[Node, Norm]) -> set[str]:
    """The stored tensors that balancing changes."""
    return {norm.name for norm in found.values()}
