"""What may be wrong with a model directory beside its KV scales: one function a kind."""

from collections.abc import Iterator, Mapping

import torch

from kvc8.backends.npu.facts import Facts
from kvc8.backends.npu.legality import breaks, limits
from kvc8.ir.checkpoint.layouts import FLOATS
from kvc8.ir.checkpoint.model_files import listed, shown
from kvc8.ir.checkpoint.msmodelslim import LABELS, SETTINGS, tied_head
from kvc8.passes.matchers.heads import share_evenly
from kvc8.tools.driver.request import Target
from kvc8.tools.inspector.finding import (
    CONFIG,
    DIRECTORY,
    Check,
    Finding,
    Severity,
    in_layers,
    inside,
    numbers,
    plural,
)
from kvc8.tools.inspector.plan import PARALLEL
from kvc8.tools.inspector.seen import Seen
from kvc8.tools.inspector.stored import head_dim, kv_heads, linears

ATTENTION, NZ_HEADS = "npu_fused_infer_attention_score", "heads and kv heads"
NZ_HEAD_DIM = 128  # the only one of NZ pages
BELONG = "copy the description and the weights that belong together"


def _labels(seen: Seen) -> Iterator[Finding]:
    """Description and tensors that disagree."""
    path = seen.files.description_path
    if path is None:
        return
    labels = {
        name: value
        for name, value in seen.files.description.items()
        if name not in SETTINGS and (value in LABELS or name in seen.tensors)
    }
    where = path.name
    if gone := [
        name
        for name, value in labels.items()
        if name not in seen.tensors and not (value == "FLOAT" and tied_head(name, seen.config))
    ]:
        what = f"labels {listed(gone)}, which no weights file holds"
        so = "part of the model is missing and kvc8-compile refuses it"
        yield Finding("label-without-tensor", "error", where, what, so, BELONG)
    bare = [name for name in seen.tensors if name not in labels]
    if odd := [name for name in bare if seen.tensors[name].kind not in FLOATS]:
        what = f"has no label for {listed(odd)}, which is not floating point"
        so = "its meaning is not known and kvc8-compile refuses it"
        yield Finding("tensor-without-label", "error", where, what, so, BELONG)
    elif bare:
        so = "kvc8 takes it as FLOAT and other runtimes may not load it"
        what = f"has no label for {listed(bare)}"
        yield Finding("tensor-without-label", "warning", where, what, so, BELONG)
    yield from _wrong_labels(seen, where, labels)


def _wrong_labels(seen: Seen, where: str, labels: Mapping[str, object]) -> Iterator[Finding]:
    wrong = [
        name
        for name, value in labels.items()
        if value == "FLOAT" and name in seen.tensors and seen.tensors[name].kind not in FLOATS
    ]
    if wrong:
        what = f"labels {listed(wrong)} FLOAT, which is not floating point"
        so = "it would be read as what it is not and kvc8-compile refuses it"
        yield Finding("wrong-label", "error", where, what, so, BELONG)
    if other := sorted({shown(v) for v in labels.values() if v not in LABELS}):
        what = f"has labels {listed(other)}, which kvc8 does not read"
        so = "kvc8-compile refuses it"
        yield Finding("label", "error", where, what, so, "quantize the model to W8A8 with C8")
    known = {*labels, *SETTINGS, "kvc8"}
    if strange := [n for n in seen.files.description if n not in known and n not in seen.tensors]:
        yield from _strange(where, [n for n in strange if not tied_head(n, seen.config)])


def _strange(where: str, names: list[str]) -> Iterator[Finding]:
    if names:
        what, so = f"says {listed(names)}, which kvc8 does not know", "kvc8 leaves it out"
        yield Finding("unknown-entry", "warning", where, what, so, "check what wrote it")


def _unread(seen: Seen) -> Iterator[Finding]:
    for warning in seen.files.warnings:
        where = inside(warning, seen.files.path)
        yield Finding("unread-file", "warning", where, warning.what, "it has no effect", warning.do)


def _switches(seen: Seen) -> Iterator[Finding]:
    """What config.json and the description say of C8 and W8A8."""
    where, description = CONFIG, seen.files.description
    settings = seen.files.config.get("quantization_config")
    said = settings.get("kv_quant_type") if isinstance(settings, dict) else None
    types = [description.get(name) for name in ("kv_cache_type", "kv_quant_type")]
    if said == "C8" and not seen.names:
        what, so = "says C8 and there are no KV scales", "kvc8-compile refuses it"
        do = "copy the quantized model's weights and description, or remove kv_quant_type"
        yield Finding("c8-without-scales", "error", where, what, so, do)
    if not seen.names and said != "C8" and not seen.latent:
        so = "its cache stays float16 and takes twice the memory"
        do = "quantize it with kvc8-quantize --use-kvcache-quant"
        yield Finding("no-c8", "warning", DIRECTORY, "there are no KV scales", so, do)
    if seen.names and seen.files.description_path and "C8" not in (said, *types):
        what = "there are KV scales and nothing says C8"
        so = "MindIE and vllm-ascend leave them unused"
        do = "write kv_cache_type and kv_quant_type C8 into the description"
        yield Finding("c8-off", "warning", DIRECTORY, what, so, do)
    elif seen.names and seen.files.description_path and types[0] != "C8":
        what, so = "has no kv_cache_type C8", "vllm-ascend leaves the KV scales unused"
        path = seen.files.description_path.name
        do = "write kv_cache_type C8 beside kv_quant_type"
        yield Finding("c8-off-vllm", "warning", path, what, so, do)


def _linears(seen: Seen) -> Iterator[Finding]:
    stored = linears(seen)
    quantized = any("W8A8" in kinds for kinds in stored.values())
    if seen.names and not quantized:
        what, so = "there is C8 and no W8A8", "the vendor's runtimes do not support it; kvc8 does"
        do = "add W8A8 with kvc8-quantize for those"
        yield Finding("c8-only", "warning", DIRECTORY, what, so, do)
    for group in (("q", "k", "v"), ("gate", "up")):
        mixed = [
            layer
            for layer, kinds in stored.items()
            if layer is not None
            and sum(any(name in names for name in group) for names in kinds.values()) > 1
        ]
        if mixed:
            what = f"{', '.join(group)} are not all of one kind"
            so = "MindIE, which packs them into one linear, cannot load it"
            do = "roll all of them back to float, or none"
            yield Finding("mixed-linears", "warning", in_layers(mixed), what, so, do)


def _config(seen: Seen) -> Iterator[Finding]:
    """Fields of config.json that contradict each other."""
    where, config = CONFIG, seen.config
    do = "correct it from the model's original config.json"
    old, new = config.get("torch_dtype"), config.get("dtype")
    if old and new and old != new:
        what = f"torch_dtype is {shown(old)} and dtype is {shown(new)}"
        so = "runtimes differ in which they take; kvc8 takes dtype"
        yield Finding("config", "warning", where, what, so, do)
    heads, kv = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv, int) and kv > 0 and heads % kv:
        what = f"num_attention_heads is {heads} and num_key_value_heads {kv}"
        so = "query heads cannot be shared out over KV heads"
        yield Finding("config", "error", where, what, so, do)
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and seen.layers and len(kinds) != seen.layers:
        what = f"layer_types has {plural(len(kinds), 'entry', 'entries')} and num_hidden_layers is "
        what += str(seen.layers)
        so = "it is not known which layer is of which kind"
        yield Finding("config", "error", where, what, so, do)
    quantize = seen.files.config.get("quantize")
    quantized = any("W8A8" in found for found in linears(seen).values())
    if quantized != (quantize in ("w8a8", "W8A8")) and (quantized or quantize is not None):
        what = (
            f"quantize is {shown(quantize)} and the linears are {'W8A8' if quantized else 'float'}"
        )
        so = "MindIE may look for other files or read them wrongly"
        do = f'write "quantize": "{"w8a8" if quantized else "float"}"'
        severity: Severity = "note" if quantize is None else "warning"
        yield Finding("config", severity, where, what, so, do)


def _bfloat16(seen: Seen) -> Iterator[Finding]:
    if seen.names and seen.dtype == "bfloat16":
        what = "says bfloat16 beside an int8 KV cache"
        so = "it is outside of what the vendor supports (float16)"
        do = "compare its answers, or convert the model to float16"
        yield Finding("bfloat16", "warning", CONFIG, what, so, do)


def _tied(seen: Seen) -> Iterator[Finding]:
    tied = seen.files.config.get("tie_word_embeddings", seen.config.get("tie_word_embeddings"))
    if tied is not True:
        return
    stored = [name for name in seen.tensors if name.endswith("lm_head.weight")]
    if stored:
        what = f"ties the embedding to lm_head and {listed(stored)} is stored too"
        so = "some runtimes take the one and some the other"
        do = "remove it, or say tie_word_embeddings false if the two differ"
        yield Finding("tied", "warning", CONFIG, what, so, do)
    else:
        what = "ties the embedding to lm_head, which is not stored"
        so = "kvc8 reads the embedding; msModelSlim does not save such a model"
        do = "look at what wrote it before you give it to the vendor's runtimes"
        yield Finding("tied", "note", CONFIG, what, so, do)


def _parallel(seen: Seen) -> Iterator[Finding]:
    heads = kv_heads(seen)
    uneven = [n for n in PARALLEL if heads and not share_evenly(heads, n)]
    if uneven:
        what = f"{plural(heads, 'KV head')} cannot be shared by {numbers(uneven)} cards"
        so = "these tensor-parallel sizes do not run"
        do = f"use 1 card or a divisor or a multiple of {heads}"
        severity: Severity = "warning" if len(uneven) == len(PARALLEL) else "note"
        yield Finding("parallel", severity, CONFIG, what, so, do)
    beyond = [n for n in PARALLEL if n > heads and n not in uneven] if heads else []
    if beyond:
        what = f"{plural(heads, 'KV head is', 'KV heads are')} fewer than {numbers(beyond)} cards"
        so = f"each is kept {beyond[-1] // heads} times on {beyond[-1]} cards"
        do = f"plan for the cache of {plural(heads, 'card')}; more save none of it"
        yield Finding("replicated", "note", CONFIG, what, so, do)


def _norm_biases(seen: Seen) -> Iterator[Finding]:
    if seen.norm_biases:
        what = f"{listed(seen.norm_biases)} of an anti-outlier method are not zero"
        so = "a runtime that leaves out biases of norms answers wrongly; kvc8 adds them"
        yield Finding("norm-bias", "note", DIRECTORY, what, so, "compare answers before use")


def _unused(seen: Seen) -> Iterator[Finding]:
    for warning in seen.captured_with:
        what, so = warning.what, "it has no effect"
        yield Finding("unused-tensor", "warning", DIRECTORY, what, so, warning.do)


def _wide_weights(seen: Seen) -> Iterator[Finding]:
    wide = [
        t.name
        for t in seen.tensors.values()
        if t.dtype is torch.float32 and t.name.endswith("weight") and len(t.shape) > 1
    ]
    if wide and seen.dtype in ("float16", "bfloat16"):
        what = f"{plural(len(wide), 'weight is', 'weights are')} float32 and config.json says "
        what += seen.dtype
        so, them = ("they take", "them") if len(wide) > 1 else ("it takes", "it")
        so += " twice the space"
        do = f"convert {them}, or quantize with the model loaded in {seen.dtype}"
        yield Finding("float32-weight", "warning", DIRECTORY, what, so, do)


def _nz_heads(seen: Seen) -> Iterator[Finding]:
    """Numbers of heads that NZ pages are served with and not documented for."""
    heads = seen.config.get("num_attention_heads")
    if not seen.names or head_dim(seen) != NZ_HEAD_DIM or not isinstance(heads, int):
        return
    asked: Facts = {"cache format": "NZ", NZ_HEADS: f"{heads} and {kv_heads(seen)}"}
    for broken in breaks(ATTENTION, limits(Target("npu").soc)[ATTENTION], asked):
        what, so = broken.reason(Target("npu").soc), "kvc8-compile refuses --kv-format nz"
        yield Finding("nz-heads", "note", CONFIG, what, so, broken.cure)


MODEL_CHECKS: tuple[Check, ...] = (
    _labels,
    _config,
    _switches,
    _linears,
    _bfloat16,
    _wide_weights,
    _tied,
    _norm_biases,
    _unused,
    _parallel,
    _nz_heads,
    _unread,
)
