"""Whether heads of attention divide among ranks; nothing heavy is imported."""

from collections.abc import Sequence

from kvc8.ir.errors import TargetError


def check_ranks(heads: Sequence[tuple[int, int]], ranks: int) -> None:
    """Raise TargetError where no attention divides: every rank would hold the whole cache.

    `heads` are of each attention those of the query and of K and V.
    """
    if not heads or any(_fits(ranks, *each) for each in heads):
        return
    most = max(query for query, _ in heads)
    fit = [str(n) for n in range(2, most + 1) if all(_fits(n, *each) for each in heads)]
    has = " or ".join(f"{query} heads over {kv} KV heads" for query, kv in sorted(set(heads)))
    use = f"use one of {', '.join(fit)}" if fit else "leave it whole"
    raise TargetError("shard", f"{has} do not divide among {ranks} ranks", use)


def _fits(ranks: int, query: int, kv: int) -> bool:
    return query % ranks == 0 and share_evenly(kv, ranks)


def share_evenly(kv: int, ranks: int) -> bool:
    """Whether each rank gets as many KV heads, or each KV head as many ranks."""
    return kv % ranks == 0 or ranks % kv == 0
