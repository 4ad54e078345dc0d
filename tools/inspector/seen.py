"""Look at a model directory without refusing what the compiler would refuse.

Read are JSON files, headers, scales of the cache and of inputs and the biases of norms; of the
weights nothing. The model is captured as kvc8-compile does it, from its config, to see what lies
between k_proj and the cache, and lowered, to see whether the NPU half takes it.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvc8.backends.npu import legality
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir import ops
from kvc8.ir.capture.accounts import account
from kvc8.ir.capture.parameters import check_kv_scales
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.compressed_tensors import kv_name as compressed_kv_name
from kvc8.ir.checkpoint.layouts import (
    KVName,
    Side,
    fact,
    kv_widths,
    layer_count,
    layer_index,
)
from kvc8.ir.checkpoint.msmodelslim import calibrated_of, kv_name, layout_of
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, Files, understand
from kvc8.ir.checkpoint.safetensors_files import StoredTensor, TensorFiles
from kvc8.ir.errors import KVC8Error, ModelError, ModelWarning
from kvc8.ir.expression import stored_names
from kvc8.ir.program import Program, Stage, argument, expression_of
from kvc8.passes import pipeline
from kvc8.passes.fold_latent_attention import fold_latent_attention
from kvc8.passes.insert_dynamic_quant import insert_dynamic_quant
from kvc8.passes.insert_linear_quant import insert_linear_quant
from kvc8.passes.matchers.rope import Rope, find_rope, from_linear
from kvc8.passes.remove_identities import remove_identities
from kvc8.tools.driver.compiling import quantize
from kvc8.tools.driver.request import Target

LARGEST_SCALE = 1 << 20  # numbers; what claims to hold more is no scale of a cache


@dataclass(frozen=True)
class KLayer:
    """What lies between a layer's k_proj and its cache."""

    rope: Rope | None
    direct: bool  # nothing but RoPE and a bias


@dataclass(frozen=True)
class Seen:
    """A model directory as kvc8-inspect sees it."""

    files: Files
    config: Mapping[str, object]  # of the language model: `text_config` where there is one
    layout: str
    layers: int  # 0 where config.json does not say
    widths: tuple[int, ...]  # kv_heads * head_dim of each layer; empty where that is not known
    names: Mapping[KVName, str]
    values: Mapping[KVName, Tensor]  # KV scales and offsets in their stored dtypes
    calibrated: Calibrated | None
    k_layers: Mapping[int, KLayer]  # empty where the model cannot be captured
    inputs: Mapping[str, tuple[str, str]]  # of linears in W8A8: equal where scales are
    norm_biases: tuple[str, ...]  # that the checkpoint adds to the model
    captured_with: tuple[ModelWarning, ...]
    refusal: KVC8Error | None  # what kvc8-compile says; None where it compiles
    npu_refusal: KVC8Error | None = None  # what it says for the NPU alone
    latent: int = 0  # channels that a token's latents take in all layers, in the place of K and V

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor by name."""
        return self.files.tensors

    def have(self, side: Side) -> list[int]:
        """The layers that have a scale for K or V."""
        return sorted(key[0] for key in self.names if key[1:] == (side, "scale"))

    @property
    def dtype(self) -> str:
        """What config.json says the model computes in."""
        found = self.config.get("dtype", self.config.get("torch_dtype"))
        return str(found or "float32").removeprefix("torch.")


def look(files: Files, calibrated: Calibrated | None = None) -> Seen:
    """See what the files of a directory mean; `calibrated` overrules what its layout implies."""
    text = files.config.get("text_config")
    config = text if isinstance(text, dict) else files.config
    checkpoint, refusal = _understood(files)
    program, warned, why = _captured(files, checkpoint, sound=not refusal)
    why, for_npu = refusal or why, None
    if program and not why:
        why, for_npu = _refusals(program, scaled=bool(checkpoint and checkpoint.kv))
    reader, names = TensorFiles(), _kv_names(files)
    small = {k: n for k, n in names.items() if files.tensors[n].nbytes <= 4 * LARGEST_SCALE}
    return Seen(
        files=files,
        config=config,
        layout=checkpoint.layout if checkpoint else _layout(files),
        layers=_count(config),
        widths=_widths(files),
        names=names,
        values={key: reader.read(files.tensors[name]).flatten() for key, name in small.items()},
        calibrated=(calibrated or _calibrated(files, checkpoint)) if names else None,
        k_layers=_k_layers(program) if program else {},
        inputs=checkpoint.inputs if checkpoint else {},
        norm_biases=tuple(_norm_biases(program)) if program else (),
        captured_with=warned,
        refusal=why,
        npu_refusal=for_npu,
        latent=_latent(program) if program else 0,
    )


def _understood(files: Files) -> tuple[Checkpoint | None, KVC8Error | None]:
    try:
        checkpoint = understand(files)
    except ModelError as error:
        return None, error
    try:
        check_kv_scales(checkpoint)
    except ModelError as error:
        return checkpoint, error
    return checkpoint, None


def _captured(
    files: Files, checkpoint: Checkpoint | None, sound: bool
) -> tuple[Program | None, tuple[ModelWarning, ...], KVC8Error | None]:
    """Capture the model; gives the program, warnings, and why there is none.

    Where its KV scales are not sound it is captured as if there were none.
    """
    plain = Checkpoint(files.path, files.config, "float", files.tensors, {}, {}, None, ())
    given = checkpoint or plain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is found by other ways
            program = capture(given if sound else replace(given, kv={}, kv_calibrated=None))
    except KVC8Error as error:
        return None, (), error
    return program, tuple(account(checkpoint, program)) if checkpoint else (), None


def _refusals(program: Program, scaled: bool) -> tuple[KVC8Error | None, KVC8Error | None]:
    """Why a model is not compiled, and why not for the NPU, if so; it is lowered to find out."""
    whole, target = program.copy(), Target("npu")
    try:
        _quantize(whole, scaled)
    except KVC8Error as error:
        return error, None
    try:
        lowered, _ = pipeline.lower_for_npu(whole)
        for phase in lowered.values():
            legality.check(phase, target.soc, target.block_size)
    except KVC8Error as error:
        return None, error
    return None, None


def _quantize(program: Program, scaled: bool) -> None:
    """Bring a program to QUANTIZED; without scales its cache stays float, which takes no pass."""
    if scaled:
        quantize(program)
        return
    exact = (remove_identities, fold_latent_attention)
    pipeline.run(program, (*exact, insert_linear_quant, insert_dynamic_quant))
    program.stage = Stage.QUANTIZED


def _latent(program: Program) -> int:
    """The channels of a token's latents in all layers; 0 where K and V of heads are cached."""
    folded = program.copy()
    told = pipeline.run(folded, (remove_identities, fold_latent_attention))
    found = any(name == fold_latent_attention.name and not said.why_not for name, said in told)
    return sum(cache.heads * cache.head_dim for cache in kv_layout(folded).caches) if found else 0


def _norm_biases(program: Program) -> Iterator[str]:
    for node in program.calls(torch.ops.aten.add.Tensor):
        if node.name.startswith("norm_bias"):
            yield from stored_names(expression_of(argument(node, 1)))


def _k_layers(program: Program) -> dict[int, KLayer]:
    found = {}
    for layer, write in enumerate(program.calls(ops.cache_write)[::2]):  # of each layer K, then V
        rope = find_rope(argument(write, 1))
        found[layer] = KLayer(rope, from_linear(rope.source if rope else argument(write, 1)))
    return found


def _kv_names(files: Files) -> dict[KVName, str]:
    """KV scales by layer and side; the first of two that claim one place."""
    read = kv_name if files.description_path else compressed_kv_name
    found: dict[KVName, str] = {}
    for name in files.tensors:
        if key := read(name) or kv_name(name):
            found.setdefault(key, name)
    return found


def _count(config: Mapping[str, object]) -> int:
    try:
        return layer_count(config, "")
    except ModelError:
        return 0


def _widths(files: Files) -> tuple[int, ...]:
    try:
        return kv_widths(files.config, "")
    except ModelError:
        return ()


def _layout(files: Files) -> str:
    """The layout of a directory that does not make sense: what its files look like."""
    if files.description_path:
        return layout_of(files.description_path, files.description, files.tensors)
    settings = files.config.get("quantization_config")
    compressed = isinstance(settings, dict) and "kv_cache_scheme" in settings
    return "compressed-tensors" if compressed else "float"


def _calibrated(files: Files, checkpoint: Checkpoint | None) -> Calibrated:
    if checkpoint and checkpoint.kv_calibrated:
        return checkpoint.kv_calibrated
    if not files.description_path:
        return "post-rope"
    return calibrated_of("", _layout(files), {})


def head_dim(seen: Seen) -> int:
    """Channels of a head, as config.json says or implies; 1 where it does neither."""
    heads, hidden = (fact(seen.config, n) for n in ("num_attention_heads", "hidden_size"))
    found = seen.config.get("head_dim")
    if found is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        found = hidden // heads
    return found if isinstance(found, int) else 1


def kv_heads(seen: Seen) -> int:
    """KV heads of a layer; 0 where there are none, config.json does not say, or layers differ."""
    if seen.latent:
        return 0
    dim, widths = head_dim(seen), set(seen.widths)
    return widths.pop() // dim if len(widths) == 1 else 0


def short_dtype(dtype: torch.dtype) -> str:
    """A dtype as config.json writes it: float16."""
    return str(dtype).removeprefix("torch.")


Kinds = Mapping[str, tuple[str, ...]]  # W8A8 or a dtype: the short names of linears stored so


ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down")


def _order(name: str) -> tuple[int, str]:
    return ORDER.index(name) if name in ORDER else len(ORDER), name


def linears(seen: Seen) -> dict[int | None, Kinds]:
    """How the linears of each layer are stored, and those of no layer (None)."""
    found: dict[int | None, dict[str, dict[str, None]]] = {i: {} for i in range(seen.layers)}
    for name, tensor in seen.tensors.items():
        *path, module, part = ["", "", *name.split(".")]
        if part != "weight" or len(tensor.shape) < 2:
            continue
        kind = "W8A8" if tensor.dtype is torch.int8 else short_dtype(tensor.dtype)
        layer, short = layer_index(path), module.removesuffix("_proj")
        found.setdefault(layer, {}).setdefault(kind, {})[short] = None
    return {
        layer: {kind: tuple(sorted(names, key=_order)) for kind, names in kinds.items()}
        for layer, kinds in found.items()
    }
