"""How much memory the cache of a model takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvc8.passes.matchers.heads import share_evenly
from kvc8.tools.inspector.stored import Stored, kv_heads

GB = 2**30  # the unit of a card's memory
CARDS = (32, 64)  # GB
PARALLEL = (2, 4, 8)  # the tensor-parallel sizes of one server of 8 cards
BLOCK = 128  # tokens a block of the cache holds, by default


@dataclass(frozen=True)
class CacheRow:
    """What the cache takes of each card, and how many tokens fit beside the weights."""

    cache: str  # float16 or C8
    cards: int  # tensor parallel over so many
    bytes_per_token: int  # on each card
    tokens: Mapping[int, int]  # by the GB of a card: whole blocks; 0 where the weights do not fit


@dataclass(frozen=True)
class MemoryPlan:
    """The memory plan: weights are as stored, and shared out evenly over cards."""

    weights_bytes: int
    rows: tuple[CacheRow, ...]


def plan(known: Stored) -> MemoryPlan:
    """Work out the memory plan; without rows where config.json does not say how wide a cache is.

    Nothing is set aside for activations, the runtime and what it duplicates on each card.
    """
    weights = sum(tensor.nbytes for tensor in known.tensors.values())
    if known.latent:  # which stays float, and whole on each card
        return MemoryPlan(weights, (_row("float16", 1, 2 * known.latent, weights),))
    channels = 2 * sum(known.widths)  # K and V of a token
    rows = [_row("float16", 1, 2 * channels, weights), _row("C8", 1, channels, weights)]
    heads = kv_heads(known)
    for cards in PARALLEL:
        if heads and share_evenly(heads, cards):
            here = channels // heads * max(1, heads // cards)
            rows.append(_row("C8", cards, here, weights))
    return MemoryPlan(weights, tuple(rows) if channels else ())


def _row(cache: str, cards: int, each: int, weights: int) -> CacheRow:
    free = {size: size * GB - -(-weights // cards) for size in CARDS}
    fit = {size: max(0, room // (each or 1) // BLOCK * BLOCK) for size, room in free.items()}
    return CacheRow(cache, cards, each, fit)
