"""What may be wrong with the KV scales of a checkpoint: one function a kind."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from kvc8.ir.checkpoint.layouts import SIDES, KVName, Side
from kvc8.ir.checkpoint.w8a8 import whole
from kvc8.passes.repair_rope_scales import largest_ratio
from kvc8.tools.inspector.finding import DIRECTORY, Check, Finding, in_layers, plural
from kvc8.tools.inspector.seen import Seen
from kvc8.tools.inspector.stored import head_dim

AGAIN = "calibrate the KV cache again"


def _bad_scales(seen: Seen) -> Iterator[Finding]:
    """Scales that quantize cannot divide by."""
    kinds: Mapping[str, Callable[[Tensor], Tensor]] = {
        "zero": lambda s: s == 0,
        "negative": lambda s: (s < 0) & s.isfinite(),
        "infinite": torch.isinf,
        "not a number": torch.isnan,
    }
    if _no_data(seen):
        return
    for side in SIDES:
        for word, test in kinds.items():
            counts = {i: int(test(s.float()).sum()) for i, s in _scales(seen, side).items()}
            if bad := [i for i, count in counts.items() if count]:
                what = f"{plural(sum(counts.values()), 'scale is', 'scales are')} {word}"
                so = "no value can be quantized there and kvc8-compile refuses the model"
                yield Finding("bad-scale", "error", _place(bad, side), what, so, AGAIN)


def _no_data(seen: Seen) -> bool:
    scales = [value for key, value in seen.values.items() if key[2] == "scale"]
    return bool(scales) and not any(bool(value.any()) for value in scales)


def _empty_shards(seen: Seen) -> Iterator[Finding]:
    if _no_data(seen):
        so = "its cost can be worked out and it compiles, but it does not run"
        do = "copy the weights before you run it"
        yield Finding("no-data", "warning", DIRECTORY, "every KV scale is zero", so, do)


def _subnormal_scales(seen: Seen) -> Iterator[Finding]:
    for side in SIDES:
        found = {}
        for layer, scale in _scales(seen, side).items():
            least = torch.finfo(scale.dtype).smallest_normal
            found[layer] = int(((scale > 0) & (scale < least)).sum())
        if bad := [layer for layer, count in found.items() if count]:
            dtype = str(_scales(seen, side)[bad[0]].dtype).removeprefix("torch.")
            what = f"{plural(sum(found.values()), 'scale is', 'scales are')} subnormal in {dtype}"
            so = "they have lost bits, and ops that multiply by the reciprocal may get infinity"
            do = "calibrate with texts that reach these channels"
            yield Finding("subnormal-scale", "warning", _place(bad, side), what, so, do)


def _offsets(seen: Seen) -> Iterator[Finding]:
    for side in SIDES:
        offsets = _of(seen, side, "offset")
        odd = [i for i, z in offsets.items() if not whole(z)]
        if odd:
            what = "an offset is not a whole number from -256 to 256"
            so = "it names no code and kvc8-compile refuses the model"
            yield Finding("bad-offset", "error", _place(odd, side), what, so, AGAIN)
        used = {i: z for i, z in offsets.items() if i not in odd and bool(z.any())}
        if used:
            low, high = (int(f(z.float() for z in used.values())) for f in (_least, _most))
            what = f"offsets are not zero ({low} to {high})"
            capped = bool(seen.config.get("attn_logit_softcapping"))
            yield _used_offsets(_place(list(used), side), side == "k" and not capped, what)


def _used_offsets(where: str, taken_off: bool, what: str) -> Finding:
    """vllm-ascend adds offsets and takes none off: K's move all logits of a row by one number."""
    if taken_off:
        so = "MindIE, which passes on a float's bits, answers wrongly (in vllm-ascend, which never "
        so += "takes them off, softmax does)"
        do = "run it with kvc8 or vllm-ascend, or quantize again without them for MindIE"
        return Finding("k-offset", "warning", where, what, so, do)
    so = "MindIE, which passes on a float's bits, and vllm-ascend, which adds them and "
    so += "never takes them off, answer wrongly"
    do = "run it with kvc8, or quantize again with kv_sym=True for those"
    return Finding("offset", "warning", where, what, so, do)


def _least(values: Iterator[Tensor]) -> float:
    return min(float(value.min()) for value in values)


def _most(values: Iterator[Tensor]) -> float:
    return max(float(value.max()) for value in values)


def _widths(seen: Seen) -> Iterator[Finding]:
    for side in SIDES:
        yield from _widths_of(seen, side, "scale")
        yield from _widths_of(seen, side, "offset")


def _widths_of(seen: Seen, side: Side, part: Literal["scale", "offset"]) -> Iterator[Finding]:
    wrong: dict[tuple[int, int], list[int]] = {}
    for (layer, *rest), name in sorted(seen.names.items()):
        if rest != [side, part] or layer >= len(seen.widths):
            continue
        has, wants = math.prod(seen.tensors[name].shape), seen.widths[layer]
        if has not in ((wants,) if seen.layout != "compressed-tensors" else (1,)):
            wrong.setdefault((has, wants), []).append(layer)
    for (has, wants), layers in wrong.items():
        what = f"the {part} holds {has:,} numbers and config.json asks for {wants:,}"
        so = "it belongs to another model or another part of one"
        do = "use the config.json and the weights that belong together"
        yield Finding("width", "error", _place(layers, side), what, so, do)


def _missing_layers(seen: Seen) -> Iterator[Finding]:
    if not seen.names or not seen.layers:
        return
    for side in SIDES:
        have = seen.have(side)
        if missing := sorted(set(range(seen.layers)) - set(have)):
            what = f"there is no scale, and {plural(len(have), 'layer has', 'layers have')} one"
            so = "the cache of these layers has no int8 form"
            yield Finding("missing-layer", "error", _place(missing, side), what, so, AGAIN)
        if surplus := [layer for layer in have if layer >= seen.layers]:
            what = f"there are scales and config.json says {plural(seen.layers, 'layer')}"
            so = "config.json or the weights are of another model"
            do = "correct num_hidden_layers, or take the right weights"
            yield Finding("surplus-layer", "error", _place(surplus, side), what, so, do)


def _scale_dtype(seen: Seen) -> Iterator[Finding]:
    for side in SIDES:
        wide = [i for i, s in _scales(seen, side).items() if s.dtype is torch.float32]
        if wide and seen.dtype == "float16" and seen.layout != "compressed-tensors":
            what = "scales are float32 and config.json says float16"
            so = "the vendor's runtimes, whose page asks for float16, may misread them"
            do = "run it with kvc8, or quantize with the model loaded in float16"
            yield Finding("float32-scale", "warning", _place(wide, side), what, so, do)


def k_ratios(seen: Seen) -> dict[int, float]:
    """For each layer with pre-RoPE scales: the most RoPE can reach over what a scale holds."""
    found: dict[int, float] = {}
    for layer, scale in _scales(seen, "k").items():
        k = seen.k_layers.get(layer)
        wide, offset = scale.float(), seen.values.get((layer, "k", "offset"))
        sound = bool((wide.isfinite() & (wide > 0)).all()) and (offset is None or whole(offset))
        if k is None or k.rope is None or not k.direct or not sound or not _fits(seen, layer):
            continue
        heads = (-1, head_dim(seen))
        zero = offset.float().reshape(heads) if offset is not None and offset.any() else None
        found[layer] = largest_ratio(wide.reshape(heads), zero, k.rope)
    return found


def _fits(seen: Seen, layer: int) -> bool:
    keys: tuple[KVName, KVName] = (layer, "k", "scale"), (layer, "k", "offset")
    sizes = {seen.values[key].numel() for key in keys if key in seen.values}
    return layer < len(seen.widths) and sizes == {seen.widths[layer]}


def _pre_rope(seen: Seen) -> Iterator[Finding]:
    if seen.calibrated != "pre-rope":
        return
    if ratios := {i: r for i, r in k_ratios(seen).items() if r > 1}:
        worst = max(ratios, key=lambda i: ratios[i])
        cut = 1 - 1 / ratios[worst]
        what = f"scales were measured before RoPE, which reaches {ratios[worst]:.2f} times as far "
        what += f"in layer {worst}"
        so = f"MindIE and vllm-ascend clip K, by up to {cut:.0%} of a channel's reach"
        do = "compile it with kvc8, which widens them, or quantize it with kvc8-quantize"
        yield Finding("pre-rope", "warning", _place(list(ratios), "k"), what, so, do)
    if none := [i for i, k in seen.k_layers.items() if k.rope is None and k.direct]:
        what = "no RoPE lies between k_proj and the cache"
        so = "its scales hold as they are"
        yield Finding("no-rope", "note", _place(none, "k"), what, so, "leave them alone")


def _k_norm(seen: Seen) -> Iterator[Finding]:
    normed = [i for i, k in seen.k_layers.items() if not k.direct]
    if seen.calibrated == "pre-rope" and normed and seen.names:
        what = "a norm follows k_proj, where the scales were measured"
        so = "they say nothing about what the cache holds"
        do = "quantize with kvc8-quantize, which measures what is cached"
        yield Finding("k-norm", "error", _place(normed, "k"), what, so, do)


def _of(seen: Seen, side: Side, part: Literal["scale", "offset"]) -> dict[int, Tensor]:
    keys = sorted(key for key in seen.values if key[1:] == (side, part))
    return {key[0]: seen.values[key] for key in keys}


def _scales(seen: Seen, side: Side) -> dict[int, Tensor]:
    found = _of(seen, side, "scale")
    return {layer: scale for layer, scale in found.items() if scale.is_floating_point()}


def _place(layers: list[int], side: Side) -> str:
    return f"{side.upper()} of {in_layers(layers)}"


KV_CHECKS: tuple[Check, ...] = (
    _bad_scales,
    _empty_shards,
    _subnormal_scales,
    _offsets,
    _widths,
    _missing_layers,
    _k_norm,
    _pre_rope,
    _scale_dtype,
)
