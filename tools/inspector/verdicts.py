"""What each serving engine does with a directory: one table of traps, each with its source.

By their sources; none was tried on a device. vllm-ascend's lines differ in the models that they
know: "0.22 to 0.24" is 0.22.1rc1 to 0.24.0rc1, "0.25 on" is 0.25.1rc1 and what followed, as read at
182b75ea; MindIE is MindIE-LLM at 8b4871a and the vendor's page on KV Cache int8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvc8.ir.checkpoint.msmodelslim import NAME
from kvc8.tools.inspector.finding import Finding
from kvc8.tools.inspector.nz_pages import beyond_documents
from kvc8.tools.inspector.seen import Seen
from kvc8.tools.quantizer.engines import PACKED

MINDIE, OLD, NEW = "MindIE", "vllm-ascend 0.22 to 0.24", "vllm-ascend 0.25 on"
ASCEND = (OLD, NEW)
ENGINES = (MINDIE, *ASCEND)
PAGE = "page on KV Cache int8"
KV_C8, W8A8 = "methods/kv_c8.py", "methods/w8a8_static.py"
LABELS = "modelslim_config.py"
NAMED = ("qwen3", "glm4_moe", "minimax_m2")  # of whose KV scales 0.22 to 0.24 map the names
Kinds = frozenset[str]
Outcome = Literal["runs right", "answers wrongly", "does not load", "leaves C8 off"]
WORST: tuple[Outcome, ...] = ("does not load", "answers wrongly", "leaves C8 off")


@dataclass(frozen=True)
class Trap:
    """Something about a directory that an engine stumbles over."""

    engines: tuple[str, ...]
    outcome: Outcome
    why: str
    source: str
    here: Callable[[Seen, Kinds], bool]  # given the kinds of what was found


@dataclass(frozen=True)
class EngineVerdict:
    """What an engine does, and why; `care` holds for any C8 directory in it."""

    outcome: Outcome | Literal["not asked"]
    traps: tuple[Trap, ...] = ()
    care: tuple[str, ...] = ()


def _found(kind: str) -> Callable[[Seen, Kinds], bool]:
    return lambda _, kinds: kind in kinds


def _settings(seen: Seen) -> Mapping[str, object]:
    found = seen.files.config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _hides_description(seen: Seen, _: Kinds) -> bool:
    return seen.files.description_path is not None and bool(_settings(seen))


def _other_name(seen: Seen, _: Kinds) -> bool:
    path = seen.files.description_path
    return path is not None and path.name != NAME


def _off_in_config(seen: Seen, kinds: Kinds) -> bool:
    here = bool(seen.names) and "c8-off" not in kinds
    return here and _settings(seen).get("kv_quant_type") != "C8"


def _unnamed(seen: Seen, _: Kinds) -> bool:
    return bool(seen.names) and seen.config.get("model_type") not in NAMED


def _window(seen: Seen, _: Kinds) -> bool:
    kinds = seen.config.get("layer_types")
    sliding = "sliding_attention" in kinds if isinstance(kinds, list) else False
    everywhere = kinds is None and bool(seen.config.get("sliding_window"))
    return bool(seen.names) and (
        sliding or (everywhere and seen.config.get("use_sliding_window", True) is True)
    )


def _other_bits(seen: Seen, _: Kinds) -> bool:
    wanted = torch.float32 if seen.dtype == "bfloat16" else torch.int64
    found = {t.dtype for n, t in seen.tensors.items() if n.endswith(".deq_scale")}
    return bool(found - {wanted})


def _wide_model(seen: Seen, _: Kinds) -> bool:
    return seen.dtype not in ("float16", "bfloat16") and bool(seen.names)


def _own_inputs(seen: Seen, _: Kinds) -> bool:
    """Whether linears that an engine packs into one have other input scales each."""
    parents = {name.rpartition(".")[0] for name in seen.inputs}
    each = [
        {seen.inputs[f"{parent}.{part}"] for part in group if f"{parent}.{part}" in seen.inputs}
        for parent in parents
        for group in PACKED
    ]
    return any(len(together) > 1 for together in each)


def _theta(seen: Seen, _: Kinds) -> bool:
    return "rope_parameters" in seen.config and "rope_theta" not in seen.config


TRAPS = (
    Trap(
        (MINDIE,),
        "answers wrongly",
        "clips K, whose scales were measured before RoPE",
        PAGE,
        _found("pre-rope"),
    ),
    Trap(
        ASCEND,
        "answers wrongly",
        "clips K, whose scales were measured before RoPE",
        KV_C8,
        _found("pre-rope"),
    ),
    Trap(
        (MINDIE,),
        "answers wrongly",
        "takes offsets by the wrong bits",
        PAGE,
        lambda _, kinds: bool(kinds & {"offset", "k-offset"}),
    ),
    Trap(
        ASCEND,
        "answers wrongly",
        "adds offsets and never takes them off",
        KV_C8,
        _found("offset"),
    ),
    Trap(
        (MINDIE,),
        "does not load",
        "does not support C8 with bfloat16",
        PAGE,
        _found("bfloat16"),
    ),
    Trap(
        (MINDIE,),
        "does not load",
        "does not support C8 without W8A8",
        PAGE,
        _found("c8-only"),
    ),
    Trap(
        (MINDIE,),
        "answers wrongly",
        "expects float16 scales",
        PAGE,
        _found("float32-scale"),
    ),
    Trap(
        (MINDIE,),
        "answers wrongly",
        "looks for rope_theta at the top of config.json",
        "MindIE-LLM",
        _theta,
    ),
    Trap(
        (MINDIE,),
        "leaves C8 off",
        "finds no kv_quant_type C8 in quantization_config",
        PAGE,
        _off_in_config,
    ),
    Trap(ENGINES, "leaves C8 off", "nothing says C8", "", _found("c8-off")),
    Trap(
        ASCEND,
        "leaves C8 off",
        "finds no kv_cache_type C8",
        LABELS,
        _found("c8-off-vllm"),
    ),
    Trap(
        ENGINES,
        "does not load",
        "packs linears of two kinds into one",
        LABELS,
        _found("mixed-linears"),
    ),
    Trap(
        ASCEND,
        "does not load",
        "never reads the description beside quantization_config",
        f"{LABELS}: maybe_update_config",
        _hides_description,
    ),
    Trap(ASCEND, "does not load", f"looks for {NAME} only", LABELS, _other_name),
    Trap(
        ASCEND,
        "answers wrongly",
        "copies the bits of deq_scale as numbers of another dtype",
        W8A8,
        _other_bits,
    ),
    Trap(ENGINES, "does not load", "computes in float16 or bfloat16", "", _wide_model),
    Trap(
        ASCEND,
        "answers wrongly",
        "keeps one input scale of the linears that it packs",
        W8A8,
        _own_inputs,
    ),
    Trap(
        ASCEND,
        "answers wrongly",
        "attends beyond the window in decode steps",
        KV_C8,
        _window,
    ),
    Trap(
        (OLD,),
        "does not load",
        "knows the KV scales of Qwen3, GLM-4 MoE and MiniMax-M2 only",
        "its releases' patches",
        _unnamed,
    ),
)
CONNECTORS = (
    "it takes neither EAGLE3 (issue 12956) nor Mooncake's connector (10947), and a connector of "
    "kv_both leaves the cache float"
)
COMPRESSED = Trap(
    ENGINES, "leaves C8 off", "reads no compressed-tensors KV scales", "", lambda *_: True
)


def verdicts(seen: Seen, findings: Sequence[Finding]) -> dict[str, EngineVerdict]:
    """What each engine does with this directory; none is asked about one that kvc8 refuses."""
    if seen.refusal or any(finding.severity == "error" for finding in findings):
        return dict.fromkeys(ENGINES, EngineVerdict("not asked"))
    if seen.layout == "compressed-tensors":
        return dict.fromkeys(ENGINES, EngineVerdict("leaves C8 off", (COMPRESSED,)))
    kinds = frozenset(finding.kind for finding in findings)
    found = {
        name: tuple(t for t in TRAPS if name in t.engines and t.here(seen, kinds))
        for name in ENGINES
    }
    return {name: _verdict(seen, name, traps) for name, traps in found.items()}


def _verdict(seen: Seen, name: str, traps: tuple[Trap, ...]) -> EngineVerdict:
    outcomes = {trap.outcome for trap in traps}
    worst = [outcome for outcome in WORST if outcome in outcomes]
    outcome: Outcome = worst[0] if worst else "runs right"
    on = bool(seen.names) and outcome in ("runs right", "answers wrongly")
    if not on or name not in ASCEND:
        return EngineVerdict(outcome, traps)
    return EngineVerdict(outcome, traps, (CONNECTORS, *beyond_documents(seen)))
