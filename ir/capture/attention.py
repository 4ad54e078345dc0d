"""The attention that transformers calls while a model is traced, and the only mask it takes.

transformers makes masks and calls attention through two tables of functions. Ours stand in both
under one name. The mask function hands out a `CausalMask`, which says what a query sees; where the
rule for it is not one that kvc8 has an op for, it hands out one that says so. Attention demands
that very object, so a model that computes with its mask, makes one of its own or passes none is
refused, and so is one that tells attention anything kvc8 does not know.

What a query sees is what the mask says, for that alone decides in transformers' eager attention. A
model may tell attention a window as well; it must be the mask's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from kvc8.ir.capture.from_export import attention_site
from kvc8.ir.errors import ModelError

NAME = "kvc8"
INERT = ("position_ids",)  # what attention that unpacks sequences itself would need
OTHER = "use a model whose attention kvc8 knows"


@dataclass(frozen=True)
class CausalMask:
    """What a query sees: itself and what stands before it, `window` tokens in all, or any if 0.

    `window` is None where a query sees something else.
    """

    window: int | None


def register() -> None:
    """Put kvc8's attention and its masks into the tables of transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    *,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    local_size: int | None = None,
    **_: object,
) -> CausalMask:
    """What transformers calls for a mask; `mask_function` is the rule for one query and one key."""
    if (q_offset, kv_offset) != (0, 0):
        return CausalMask(None)
    if _same(mask_function, causal_mask_function):
        return CausalMask(0)
    if local_size and _same(mask_function, sliding_window_causal_mask_function(local_size)):
        return CausalMask(local_size)
    return CausalMask(None)


def _same(a: object, b: object) -> bool:
    """Whether two functions run the same code, and close over the same numbers and functions."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return a.__code__ is b.__code__ and _same(_closed_over(a), _closed_over(b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, int) and isinstance(b, int) and a == b


def _closed_over(function: FunctionType) -> tuple[object, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls for attention; query [1, Hq, T, D], key and value [1, H, T, D].

    Raises ModelError for anything that kvc8's attention does not do.
    """
    name = type(module).__name__
    window = _window(name, attention_mask, sliding_window)
    if dropout or is_causal is False:
        what = f"is called with dropout {dropout}" if dropout else "is called as not causal"
        raise ModelError("config.json", f"{name} {what}", OTHER)
    if s_aux is None and getattr(module, "sinks", None) is not None:
        raise ModelError("config.json", f"{name} has sinks and does not pass them as s_aux", OTHER)
    for told, given in others.items():
        if given is not None and given is not False and told not in INERT:
            what = f"{name} tells attention {told}, which kvc8 does not know"
            raise ModelError("config.json", what, OTHER)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = attention_site(*rows, scale, window, softcap or 0.0, s_aux)
    return out.unsqueeze(0), None


def _window(name: str, mask: object, told: int | None) -> int:
    """The window of a mask, which must be ours, and the one that attention is told, if any."""
    if not isinstance(mask, CausalMask):
        kind = "no mask" if mask is None else "a mask of its model's own making"
        raise ModelError("config.json", f"{name} is given {kind}", OTHER)
    if mask.window is None:
        what = "lets a token see other tokens than those before it or a window of them"
        raise ModelError("config.json", f"{name} {what}", OTHER)
    if told and told != mask.window:
        seen = f"a window of {mask.window}" if mask.window else "no window"
        what = f"{name} is told a window of {told} and its mask has {seen}"
        raise ModelError("config.json", what, "correct sliding_window and layer_types")
    return mask.window
