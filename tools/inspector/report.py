"""What kvc8-inspect prints of a captured model: the second half of the text, or all as JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from kvc8.tools.inspector.file_report import cache, table, wrap
from kvc8.tools.inspector.finding import Finding, plural
from kvc8.tools.inspector.kv_findings import k_ratios
from kvc8.tools.inspector.plan import MemoryPlan
from kvc8.tools.inspector.seen import Seen
from kvc8.tools.inspector.stored import linears
from kvc8.tools.inspector.verdicts import EngineVerdict, verdicts

# What a finding makes kvc8 do.
KVC8 = {
    "pre-rope": "widens the K scales",
    "no-data": "it runs once the weights are there",
    "no-c8": "compiles it once there are KV scales",
}


def as_json(seen: Seen, findings: Sequence[Finding], plan: MemoryPlan) -> dict[str, object]:
    """Everything in the text, and the RoPE ratio of each layer, as a JSON object."""
    ratios, stored = k_ratios(seen), linears(seen)
    layers = [
        {
            "layer": layer,
            "linears": {kind: list(names) for kind, names in stored[layer].items()},
            "cache": cache(seen, layer),
            "k_ratio": ratios.get(layer),
        }
        for layer in range(seen.layers)
    ]
    return {
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


def seen_parts(seen: Seen, findings: Sequence[Finding]) -> list[list[str]]:
    """The lines of each part of the text that says more than the files do by themselves."""
    return [_runtimes(seen, findings), _findings(findings)]


def _runtimes(seen: Seen, findings: Sequence[Finding]) -> list[str]:
    rows = [(name, _told(told)) for name, told in verdicts(seen, findings).items()]
    head = "runtimes (by their sources; none was tried on a device)"
    return [head, *table([("kvc8", "; ".join(_kvc8(seen, findings)))]), *_rows(rows)]


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """A row each under names that are long, those that say the same in one."""
    alike: dict[str, list[str]] = {}
    for name, text in rows:
        alike.setdefault(text, []).append(name)
    return [line for text, names in alike.items() for line in wrap(text, 14, _head_of(names))]


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
        lines += wrap(f"{found.where}: {found.what}", 11, f"  {found.severity}")
        lines += wrap(f"so {found.so}", 11)
        lines += wrap(found.do, 11)
    return lines
