"""The first half of what kvc8-inspect prints: what the files say, in lines of 80 characters.

It is there at once: it imports no torch, but where K or V have offsets that are not zero.
"""

import textwrap
from collections.abc import Iterable, Iterator

from kvc8.ir.checkpoint.layouts import fact
from kvc8.tools.inspector.finding import in_layers, plural
from kvc8.tools.inspector.plan import CARDS, MemoryPlan, plan
from kvc8.tools.inspector.stored import Kinds, Stored, head_dim, kv_heads, linears

WIDTH = 80


def file_parts(known: Stored) -> Iterator[list[str]]:
    """The lines of each part, as each is known."""
    planned = plan(known)
    yield _head(known, planned)
    yield _layers(known)
    if memory := _memory(planned):
        yield memory


def _head(known: Stored, planned: MemoryPlan) -> list[str]:
    heads = fact(known.config, "num_attention_heads")
    kind = [f"{known.files.config.get('model_type')}", plural(known.layers, "layer")]
    if kv_heads(known):
        kv = plural(kv_heads(known), "KV head")
        kind.append(f"{heads} query heads over {kv} of {head_dim(known)} channels")
    files = {tensor.file for tensor in known.tensors.values()}
    size = f"{plural(len(known.tensors), 'tensor')} in {plural(len(files), 'file')}"
    lines = {
        "model": ", ".join((*kind, known.dtype)),
        "layout": _layout(known),
        "weights": f"{size}, {_bytes(planned.weights_bytes)}",
    }
    return [str(known.files.path), *table(lines.items())]


def _layout(known: Stored) -> str:
    names = {"float": "Hugging Face", "compressed-tensors": "compressed-tensors"}
    writer = names.get(known.layout, f"msModelSlim's {known.layout}")
    return f"{writer}{f', K measured {known.calibrated}' if known.calibrated else ''}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GB" if count >= 2**30 else f"{count / 2**20:,.1f} MB"


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names, and beside each its text."""
    return [line for name, text in rows for line in wrap(text, 14, f"  {name}")]


def _layers(known: Stored) -> list[str]:
    """One row for each run of layers that are quantized alike."""
    stored = linears(known)
    alike: dict[str, list[int]] = {}
    for layer in range(known.layers):
        alike.setdefault(f"{_kinds(stored[layer])}; cache {cache(known, layer)}", []).append(layer)
    rows = [(in_layers(layers), text) for text, layers in alike.items()]
    rows = [(name.removeprefix("layers ").removeprefix("layer "), text) for name, text in rows]
    others = _kinds(stored.get(None, {}))
    return ["layers", *table([*rows, *([("others", others)] if others else [])])]


def _kinds(kinds: Kinds) -> str:
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in sorted(kinds.items()))


def cache(known: Stored, layer: int) -> str:
    """How a layer's K and V are cached, in words."""
    if not {(layer, "k", "scale"), (layer, "v", "scale")} <= set(known.names):
        return known.dtype
    by = "tensor" if known.layout == "compressed-tensors" else "channel"
    return f"int8 by {by}, {'asymmetric' if known.has_offsets(layer) else 'symmetric'}"


def _memory(planned: MemoryPlan) -> list[str]:
    if not planned.rows:
        return []
    cards = "".join(f"{f'{size} GB card':>17}" for size in CARDS)
    lines = [f"{'memory':<24}{'bytes a token':>16}{cards}"]
    for row in planned.rows:
        name = row.cache if row.cards == 1 else f"{row.cache} on {row.cards} cards, each"
        fit = "".join(f"{_tokens(row.tokens[size]):>17}" for size in CARDS)
        lines.append(f"  {name:<22}{row.bytes_per_token:>16,}{fit}")
    note = (
        "Tokens that fit beside the weights, shared out over the cards; nothing is set aside for "
    )
    return [*lines, *wrap(note + "activations and the runtime.", 2)]


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "too small"


def wrap(text: str, indent: int, head: str = "") -> list[str]:
    """Lines of at most 80 characters, `indent` spaces deep; the first begins with `head`."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{head:<{indent}}",
        subsequent_indent=indent * " ",
        break_long_words=False,
        break_on_hyphens=False,
    )
