"""Look at a model directory without refusing what the compiler would refuse.

Read are JSON files, headers, scales of the cache and of inputs and the biases of norms; of the
weights nothing. The model is captured as kvc8-compile does it, from its config, to see what lies
between k_proj and the cache, and lowered, to see whether the NPU half takes it.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from kvc8.backends.npu import legality
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir import ops
from kvc8.ir.capture.accounts import account
from kvc8.ir.capture.parameters import check_kv_scales
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Calibrated, Checkpoint, Files
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
from kvc8.tools.inspector.stored import Stored, stored


@dataclass(frozen=True)
class KLayer:
    """What lies between a layer's k_proj and its cache."""

    rope: Rope | None
    direct: bool  # nothing but RoPE and a bias


@dataclass(frozen=True)
class Seen(Stored):
    """A model directory as kvc8-inspect sees it, the captured model with it."""

    k_layers: Mapping[int, KLayer]  # empty where the model cannot be captured
    inputs: Mapping[str, tuple[str, str]]  # of linears in W8A8: equal where scales are
    norm_biases: tuple[str, ...]  # that the checkpoint adds to the model
    captured_with: tuple[ModelWarning, ...]
    refusal: KVC8Error | None  # what kvc8-compile says; None where it compiles
    npu_refusal: KVC8Error | None = None  # what it says for the NPU alone


def look(files: Files, calibrated: Calibrated | None = None) -> Seen:
    """See what the files of a directory mean; `calibrated` overrules what its layout implies."""
    return capture_stored(stored(files, calibrated))


def capture_stored(known: Stored) -> Seen:
    """Capture and lower what is stored, and keep what is seen there."""
    checkpoint, refusal = known.checkpoint, known.mistake or _unsound(known.checkpoint)
    program, warned, why = _captured(known.files, checkpoint, sound=not refusal)
    why, for_npu, latent = refusal or why, None, 0
    if program:
        whole = program.copy()
        latent = _fold_latents(whole)
        if not why:
            why, for_npu = _refusals(whole, scaled=bool(checkpoint and checkpoint.kv))
    return Seen(
        **{each.name: getattr(known, each.name) for each in fields(Stored)} | {"latent": latent},
        k_layers=_k_layers(program) if program else {},
        inputs=checkpoint.inputs if checkpoint else {},
        norm_biases=tuple(_norm_biases(program)) if program else (),
        captured_with=warned,
        refusal=why,
        npu_refusal=for_npu,
    )


def _unsound(checkpoint: Checkpoint | None) -> ModelError | None:
    try:
        if checkpoint:
            check_kv_scales(checkpoint)
    except ModelError as error:
        return error
    return None


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


def _refusals(whole: Program, scaled: bool) -> tuple[KVC8Error | None, KVC8Error | None]:
    """Why a model is not compiled, and why not for the NPU, if so; it is lowered to find out."""
    target = Target("npu")
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
    pipeline.run(program, (insert_linear_quant, insert_dynamic_quant))
    program.stage = Stage.QUANTIZED


def _fold_latents(program: Program) -> int:
    """Fold them as QUANTIZE begins; gives the channels of a token's latents in all layers.

    0 where K and V of heads are cached. To fold a second time changes nothing.
    """
    told = pipeline.run(program, (remove_identities, fold_latent_attention))
    found = any(name == fold_latent_attention.name and not said.why_not for name, said in told)
    return sum(c.heads * c.head_dim for c in kv_layout(program).caches) if found else 0


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
