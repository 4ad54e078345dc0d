"""What may be chosen of the passes that a compile runs, and of the limits it keeps to."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from kvc8.ir.errors import TargetError

MOST_RANKS = 1024  # heads of no model yet; a larger number is a mistake


@dataclass(frozen=True)
class Options:
    """The choices of a compile. Raises TargetError where one is not of its list."""

    # K scales that were measured before RoPE: widened to bounds after it, or used as they are.
    kv_scales: Literal["repair", "as-is"] = "repair"
    # Whose scales the cache has: a channel's, static, or a token's, made as it is written.
    kv_scales_by: Literal["channel", "token"] = "channel"
    # What a prompt sees of itself: its own float K and V, or what the cache gives back of them.
    prefill_kv: Literal["float", "int8"] = "float"
    # The cache's offsets leave the attention where that is exact, or its scales as well.
    fold: Literal["offsets", "kv"] = "offsets"
    # Several launches become one where an op does them all, or stay apart.
    fuse: Literal["on", "off"] = "on"
    # How int8 caches lie in memory (ir/nz.py).
    kv_format: Literal["nd", "nz"] = "nd"
    # The heads that NZ caches are documented for, or any: what engines ship goes beyond them.
    nz_heads: Literal["documented", "any"] = "documented"
    # How what ranks have of a W8A8 linear is added up: exactly, or as engines do, in half the bytes.
    sums: Literal["int32", "half"] = "int32"
    ranks: int = 1  # devices that the model is divided among

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= MOST_RANKS:
            what = f"is {self.ranks} and should be from 1 to {MOST_RANKS}"
            raise TargetError("ranks", what, "correct it")
        for name in NAMES:
            given, allowed = getattr(self, name), choices(name)
            if given not in allowed:
                what = f"is {given!r} and should be {' or '.join(map(repr, allowed))}"
                raise TargetError(name, what, "correct it")
        if self.kv_scales_by == "token":
            self._check_by_token()

    def _check_by_token(self) -> None:
        """Refuse what caches with a scale a token do not go with."""
        without = {"fold": "offsets", "kv_format": "nd", "ranks": 1}
        for name, only in without.items():
            if getattr(self, name) != only:
                what = f"is {getattr(self, name)} with kv_scales_by token, which goes with {only}"
                raise TargetError(name, what, "leave one of the two out")


NAMES = tuple(field.name for field in fields(Options) if field.name != "ranks")  # with a list


def choices(name: str) -> tuple[str, ...]:
    """What an option may be, its default first."""
    return get_args(get_type_hints(Options)[name])
