"""Where vllm-ascend reads its cache by an op whose document does not name the model's heads.

It keeps C8 in NZ pages and reads them in decode steps by npu_fused_infer_attention_score, with the
heads of one card. It does not ask whether the document allows them, and sources contradict it, so
what a device does there is not known: no reason to call the directory wrong, and one to try it.
"""

from collections.abc import Iterator

from kvc8.backends.npu.facts import Facts
from kvc8.backends.npu.legality import Broken, breaks, limits
from kvc8.tools.driver.request import Target
from kvc8.tools.inspector.seen import Seen
from kvc8.tools.inspector.stored import head_dim, kv_heads

CARDS = (1, 2, 4, 8)  # of one server
ATTENTION, HEADS = "npu_fused_infer_attention_score", "heads and kv heads"
SHORT = {"float16": "f16", "bfloat16": "bf16"}


def beyond_documents(seen: Seen) -> Iterator[str]:
    """What of the model the op's document does not name, in one sentence, or nothing."""
    broken = [
        (each, str(value))
        for name, value in (("query dtype", SHORT.get(seen.dtype)), ("head_dim", head_dim(seen)))
        if value is not None
        for each in _breaks({name: value})
    ]
    heads = [(cards, each) for cards in CARDS for each in _heads(seen, cards)]
    if heads:
        found = ", ".join(f"{each.found[HEADS]} on {cards}" for cards, each in heads)
        broken.append((heads[0][1], f"{found} card{'s' * (heads[-1][0] > 1)}"))
    if broken:
        said = "; ".join(f"{each.row.limit(each.found)}, and not {found}" for each, found in broken)
        [source, *_] = (each.row.source for each, _ in broken)
        others = [each.row.contradicted_by for each, _ in broken if each.row.contradicted_by]
        what = f"reads NZ pages in decode steps by {ATTENTION}, which is documented for {said}"
        yield f"it {what} ({source})" + "".join(f", though {other}" for other in others)


def _heads(seen: Seen, cards: int) -> tuple[Broken, ...]:
    heads, kv = seen.config.get("num_attention_heads"), kv_heads(seen)
    if not isinstance(heads, int) or heads % cards or not kv:
        return ()
    return _breaks({HEADS: f"{heads // cards} and {max(1, kv // cards)}"})


def _breaks(asked: Facts) -> tuple[Broken, ...]:
    return tuple(breaks(ATTENTION, limits(_soc())[ATTENTION], {"cache format": "NZ", **asked}))


def _soc() -> str:
    return Target("npu").soc
