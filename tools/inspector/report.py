"""What kvc8-inspect prints: text for a terminal of 80 columns, or the same as JSON."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from kvc8.ir.checkpoint.layouts import fact
from kvc8.tools.inspector.finding import Finding, in_layers, plural
from kvc8.tools.inspector.kv_findings import k_ratios
from kvc8.tools.inspector.plan import CARDS, MemoryPlan
from kvc8.tools.inspector.seen import Kinds, Seen, head_dim, kv_heads, linears
from kvc8.tools.inspector.verdicts import EngineVerdict, verdicts

WIDTH = 80
# What a finding makes kvc8 do.
KVC8 = {
    "pre-rope": "widens the K scales",
    "no-data": "it runs once the weights are there",
    "no-c8": "compiles it once there are KV scales",
}


def as_json(seen: Seen, findings: Sequence[Finding], plan: MemoryPlan) -> str:
    """Everything in the text, and the RoPE ratio of each layer, as one JSON object."""
    ratios, stored = k_ratios(seen), linears(seen)
    layers = [
        {
            "layer": layer,
            "linears": {kind: list(names) for kind, names in stored[layer].items()},
            "cache": _cache(seen, layer),
            "k_ratio": ratios.get(layer),
        }
        for layer in range(seen.layers)
    ]
    found = {
        "directory": str(seen.files.path),
        "model_type": seen.files.config.get("model_type"),
        "layout": seen.layout,
        "dtype": seen.dtype,
        "kv_calibrated": seen.calibrated,
        "layers": layers,
        "memory": asdict(plan),
        "runtimes": {
            "kvc8": {"outcome": "; ".join(_kvc8(seen, findings))},
            **{name: _as_dict(told) for name, told in verdicts(seen, findings).items()},
        },
        "findings": [asdict(finding) for finding in findings],
        "refusal": str(seen.refusal or ""),
    }
    return json.dumps(found, indent=1)


def as_text(seen: Seen, findings: Sequence[Finding], plan: MemoryPlan) -> str:
    """The report, in lines of at most 80 characters (but for a name that is longer)."""
    parts = [_head(seen, plan), _layers(seen), _memory(plan), _runtimes(seen, findings)]
    return "\n\n".join("\n".join(part) for part in (*parts, _findings(findings)) if part)


def _head(seen: Seen, plan: MemoryPlan) -> list[str]:
    heads = fact(seen.config, "num_attention_heads")
    kind = [f"{seen.files.config.get('model_type')}", plural(seen.layers, "layer")]
    if kv_heads(seen):
        kv = plural(kv_heads(seen), "KV head")
        kind.append(f"{heads} query heads over {kv} of {head_dim(seen)} channels")
    files = {tensor.file for tensor in seen.tensors.values()}
    size = f"{plural(len(seen.tensors), 'tensor')} in {plural(len(files), 'file')}"
    lines = {
        "model": ", ".join((*kind, seen.dtype)),
        "layout": _layout(seen),
        "weights": f"{size}, {_bytes(plan.weights_bytes)}",
    }
    return [str(seen.files.path), *_table(lines.items())]


def _layout(seen: Seen) -> str:
    names = {"float": "Hugging Face", "compressed-tensors": "compressed-tensors"}
    writer = names.get(seen.layout, f"msModelSlim's {seen.layout}")
    return f"{writer}{f', K measured {seen.calibrated}' if seen.calibrated else ''}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GB" if count >= 2**30 else f"{count / 2**20:,.1f} MB"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [line for name, text in rows for line in _wrap(text, 14, f"  {name}")]


def _layers(seen: Seen) -> list[str]:
    """One row for each run of layers that are quantized alike."""
    stored = linears(seen)
    alike: dict[str, list[int]] = {}
    for layer in range(seen.layers):
        alike.setdefault(f"{_kinds(stored[layer])}; cache {_cache(seen, layer)}", []).append(layer)
    rows = [(in_layers(layers), text) for text, layers in alike.items()]
    rows = [(name.removeprefix("layers ").removeprefix("layer "), text) for name, text in rows]
    others = _kinds(stored.get(None, {}))
    return ["layers", *_table([*rows, *([("others", others)] if others else [])])]


def _kinds(kinds: Kinds) -> str:
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in sorted(kinds.items()))


def _cache(seen: Seen, layer: int) -> str:
    if not {(layer, "k", "scale"), (layer, "v", "scale")} <= set(seen.names):
        return seen.dtype
    by = "tensor" if seen.layout == "compressed-tensors" else "channel"
    offsets = [v for key, v in seen.values.items() if key[0] == layer and key[2] == "offset"]
    kind = "asymmetric" if any(bool(value.any()) for value in offsets) else "symmetric"
    return f"int8 by {by}, {kind}"


def _memory(plan: MemoryPlan) -> list[str]:
    if not plan.rows:
        return []
    cards = "".join(f"{f'{size} GB card':>17}" for size in CARDS)
    lines = [f"{'memory':<24}{'bytes a token':>16}{cards}"]
    for row in plan.rows:
        name = row.cache if row.cards == 1 else f"{row.cache} on {row.cards} cards, each"
        fit = "".join(f"{_tokens(row.tokens[size]):>17}" for size in CARDS)
        lines.append(f"  {name:<22}{row.bytes_per_token:>16,}{fit}")
    note = (
        "Tokens that fit beside the weights, shared out over the cards; nothing is set aside for "
    )
    return [*lines, *_wrap(note + "activations and the runtime.", 2)]


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "too small"


def _wrap(text: str, indent: int, head: str = "") -> list[str]:
    """Lines of at most 80 characters, `indent` spaces deep; the first begins with `head`."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{head:<{indent}}",
        subsequent_indent=indent * " ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _runtimes(seen: Seen, findings: Sequence[Finding]) -> list[str]:
    rows = [(name, _told(told)) for name, told in verdicts(seen, findings).items()]
    head = "runtimes (by their sources; none was tried on a device)"
    return [head, *_table([("kvc8", "; ".join(_kvc8(seen, findings)))]), *_rows(rows)]


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """A row each under names that are long, those that say the same in one."""
    alike: dict[str, list[str]] = {}
    for name, text in rows:
        alike.setdefault(text, []).append(name)
    return [line for text, names in alike.items() for line in _wrap(text, 14, _head_of(names))]


def _head_of(names: list[str]) -> str:
    return f"  {', '.join(names)}: "


def _kvc8(seen: Seen, findings: Sequence[Finding]) -> list[str]:
    """What kvc8-compile does with the directory."""
    kinds = {finding.kind for finding in findings}
    if seen.refusal or any(finding.severity == "error" for finding in findings):
        return ["refuses it"]
    said = [text for kind, text in KVC8.items() if kind in kinds]
    if seen.npu_refusal:
        said.append(f"compiles it for onnx, and not for npu: {seen.npu_refusal}")
    return said or ["compiles it as it is"]


def _told(verdict: EngineVerdict) -> str:
    """A verdict in words: what the engine does, why and where that was read, and what to mind."""
    why = [f"{trap.why}{f' ({trap.source})' if trap.source else ''}" for trap in verdict.traps]
    said = f"{verdict.outcome}: {'; '.join(why)}" if why else verdict.outcome
    return ". ".join((said, *verdict.care))


def _as_dict(verdict: EngineVerdict) -> dict[str, object]:
    why = [{"does": t.outcome, "why": t.why, "source": t.source} for t in verdict.traps]
    return {"outcome": verdict.outcome, "why": why, "care": list(verdict.care)}


def _findings(findings: Sequence[Finding]) -> list[str]:
    counts = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "note")}
    head = ", ".join(plural(count, severity) for severity, count in counts.items() if count)
    lines = [f"findings: {head or 'none'}"]
    for found in findings:
        lines += _wrap(f"{found.where}: {found.what}", 11, f"  {found.severity}")
        lines += _wrap(f"so {found.so}", 11)
        lines += _wrap(found.do, 11)
    return lines
