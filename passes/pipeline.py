"""The passes of each target, in the order they run."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time

from kvc8.ir.expression import Read
from kvc8.ir.program import Program
from kvc8.passes.fold_k_offset import fold_k_offset
from kvc8.passes.fold_k_scale import fold_k_scale
from kvc8.passes.fold_kv_scales import fold_kv_scales
from kvc8.passes.fold_latent_attention import fold_latent_attention
from kvc8.passes.fold_token_smoothing import fold_token_smoothing
from kvc8.passes.fold_v_offset import fold_v_offset
from kvc8.passes.fold_v_offset_into_codes import fold_v_offset_into_codes
from kvc8.passes.fold_v_scale import fold_v_scale
from kvc8.passes.fuse_linears import fuse_linears
from kvc8.passes.fuse_norm_quant import fuse_norm_quant
from kvc8.passes.fuse_norm_rope_quant_cache import fuse_norm_rope_quant_cache
from kvc8.passes.fuse_rope_quant_cache import fuse_rope_quant_cache
from kvc8.passes.fuse_swiglu_quant import fuse_swiglu_quant
from kvc8.passes.insert_dynamic_quant import insert_dynamic_quant
from kvc8.passes.insert_kv_quant import insert_kv_quant
from kvc8.passes.insert_linear_quant import insert_linear_quant
from kvc8.passes.insert_token_quant import insert_token_quant
from kvc8.passes.lower_caches_to_nz import lower_caches_to_nz
from kvc8.passes.lower_collectives import lower_collectives
from kvc8.passes.lower_dynamic_linear import lower_dynamic_linear
from kvc8.passes.lower_geglu import lower_geglu
from kvc8.passes.lower_latent_attention import lower_latent_attention
from kvc8.passes.lower_linear import lower_linear
from kvc8.passes.lower_mixture import lower_mixture
from kvc8.passes.lower_norms import lower_norms
from kvc8.passes.lower_paged_attention import lower_paged_attention
from kvc8.passes.lower_rope import lower_rope
from kvc8.passes.lower_router import lower_router
from kvc8.passes.lower_swiglu import lower_swiglu
from kvc8.passes.options import Options
from kvc8.passes.remove_cache_copies import remove_cache_copies
from kvc8.passes.remove_identities import remove_identities
from kvc8.passes.repair_rope_scales import repair_rope_scales
from kvc8.passes.rewrite import Pass, Remark, Step, name_of, pass_of, spelled
from kvc8.passes.shard import shard

log = logging.getLogger("kvc8")

Phases = dict[str, tuple[tuple[Step, ...], tuple[Step, ...]]]
DEFAULT = Options()

# What a checkpoint means, but for its cache.
MEANING: tuple[Step, ...] = (
    remove_identities,
    fold_latent_attention,
    insert_linear_quant,
    insert_dynamic_quant,
)
# That, with its cache in int8: all targets start here, and ONNX ends here.
QUANTIZE: tuple[Step, ...] = (*MEANING, repair_rope_scales, insert_kv_quant)
AS_IS: tuple[Step, ...] = (*MEANING, insert_kv_quant)
# `--kv-scales-by token`: with scales that tokens bring along, in place of either of the two.
BY_TOKEN: tuple[Step, ...] = (*MEANING, repair_rope_scales, insert_token_quant)
BY_TOKEN_AS_IS: tuple[Step, ...] = (*MEANING, insert_token_quant)

# `--tp N`: after either of the first two, with how many ranks and how they sum bound to it.
DIVIDE: tuple[Step, ...] = (shard,)

# What reads the int8 cache: exact, and free of offsets wherever that costs nothing.
FOLD_OFFSETS: tuple[Step, ...] = (fold_kv_scales, fold_k_offset, fold_v_offset)
# Attention over NZ pages takes no offset at all.
FOLD_ALL_OFFSETS: tuple[Step, ...] = (*FOLD_OFFSETS, fold_v_offset_into_codes)
# `--fold kv`: every offset and scale into what stands either side of the attention. A prefill that
# sees its own float K and V uses float weights as they are.
FOLD_KV: tuple[Step, ...] = (
    *FOLD_OFFSETS,
    fold_v_offset_into_codes,
    partial(fold_v_scale, weights=False),
    partial(fold_k_scale, weights=False),
)
FOLD_KV_AND_WEIGHTS: tuple[Step, ...] = (
    *FOLD_OFFSETS,
    fold_v_offset_into_codes,
    fold_v_scale,
    fold_k_scale,
)

# `--kv-scales-by token`: there are no offsets then, and no other scales.
FOLD_TOKENS: tuple[Step, ...] = (fold_token_smoothing,)

# A decoder layer without its attention, in NPU ops.
LAYER: tuple[Step, ...] = (
    fuse_linears,
    lower_linear,
    lower_dynamic_linear,
    lower_router,
    lower_mixture,
    lower_collectives,
    lower_norms,
    lower_rope,
    lower_swiglu,
    lower_geglu,
)

NPU_PREFILL: tuple[Step, ...] = (
    fold_kv_scales,  # and no more: it sees K and V before they are quantized
    *LAYER,
    partial(lower_latent_attention, phase="prefill"),
    partial(lower_paged_attention, phase="prefill"),
    remove_cache_copies,
)
# After one of the folds above and LAYER:
NPU_PREFILL_INT8: tuple[Step, ...] = (
    partial(lower_latent_attention, phase="prefill"),
    partial(lower_paged_attention, phase="prefill", prefill_kv="int8"),
    remove_cache_copies,
)
NPU_CHUNK: tuple[Step, ...] = (
    partial(lower_latent_attention, phase="chunk"),
    partial(lower_paged_attention, phase="chunk"),
    remove_cache_copies,
)
NPU_DECODE: tuple[Step, ...] = (
    partial(lower_latent_attention, phase="decode"),
    partial(lower_paged_attention, phase="decode"),
    remove_cache_copies,
)

# `--kv-format nz`: after each of the three above.
NZ: tuple[Step, ...] = (lower_caches_to_nz,)

# What several launches do by one that does them all; `--fuse off` leaves it out.
FUSE: tuple[Step, ...] = (fuse_rope_quant_cache, fuse_norm_quant, fuse_swiglu_quant)
FUSE_NZ: tuple[Step, ...] = (fuse_norm_rope_quant_cache, fuse_norm_quant, fuse_swiglu_quant)


def quantize_passes(options: Options) -> tuple[Step, ...]:
    """The passes up to QUANTIZED."""
    repair = options.kv_scales == "repair"
    if options.kv_scales_by == "token":
        passes = BY_TOKEN if repair else BY_TOKEN_AS_IS
    else:
        passes = QUANTIZE if repair else AS_IS
    dividing = (partial(step, ranks=options.ranks, sums=options.sums) for step in DIVIDE)
    return (*passes, *dividing) if options.ranks > 1 else passes


def reading(passes: tuple[Step, ...], read: Read) -> tuple[Step, ...]:
    """The passes, with stored tensors shown to the one whose remarks tell of them."""
    return tuple(partial(p, read=read) if p is repair_rope_scales else p for p in passes)


@dataclass(frozen=True)
class Ran:
    """A pass that ran: the program before it, the program after it, and what it said of sites.

    Both programs are copies, which may be kept; `after` is the `before` of the next one.
    """

    path: str  # "" up to QUANTIZED, "int8" for what phases share, or the phase
    number: int  # of this pass among those that its program went through, from 1
    step: Pass
    spelled: str  # the pass with its options, as kvc8-opt takes it
    before: Program
    after: Program
    remarks: Sequence[Remark]
    seconds: float = 0.0  # of processor time that it took, which differs from run to run


See = Callable[[Ran], None]


def run(
    program: Program,
    passes: tuple[Step, ...],
    see: See | None = None,
    path: str = "",
    first: int = 0,
) -> list[tuple[str, Remark]]:
    """Run passes over a program; gives each remark with its pass.

    `see` is shown each pass once it ran, numbered from `first`; without it nothing is copied.
    """
    told: list[tuple[str, Remark]] = []
    before = program.copy() if see else program
    for number, step in enumerate(passes, first + 1):
        start = process_time()
        remarks, name = step(program), name_of(step)
        seconds = process_time() - start
        told += [(name, remark) for remark in remarks]
        for remark in remarks:
            log.debug("%s: %s", name, remark)
        if see:
            after = program.copy()
            see(Ran(path, number, pass_of(step), spelled(step), before, after, remarks, seconds))
            before = after
    return told


def lower_for_npu(
    program: Program, options: Options = DEFAULT, see: See | None = None
) -> tuple[dict[str, Program], list[tuple[str, Remark]]]:
    """The program of each phase of a QUANTIZED one, which stays as it is, and the remarks.

    `see` is that of `run`.
    """
    of_int8, told = program.copy(), list[tuple[str, Remark]]()
    plan = phases(options)
    shared, _ = plan["decode"]
    first = len(quantize_passes(options))
    told += run(of_int8, shared, see, "int8", first)
    lowered = {}
    for phase, (before, passes) in plan.items():
        start = of_int8 if before else program
        lowered[phase] = start if phase == "decode" else start.copy()  # decode is the last
        told += run(lowered[phase], passes, see, phase, first + len(before))
    return lowered, told


def phases(options: Options = DEFAULT) -> Phases:
    """The passes of each phase, after those up to QUANTIZED: the shared ones, then its own."""
    int8, nz = options.prefill_kv == "int8", options.kv_format == "nz"
    every = FOLD_KV_AND_WEIGHTS if int8 else FOLD_KV
    offsets = FOLD_ALL_OFFSETS if nz else FOLD_OFFSETS
    folds = every if options.fold == "kv" else offsets
    shared = (*(FOLD_TOKENS if options.kv_scales_by == "token" else folds), *LAYER)
    fusing = FUSE_NZ if nz else FUSE
    last = (*(NZ if nz else ()), *(fusing if options.fuse == "on" else ()))
    return {
        "prefill": (shared, (*NPU_PREFILL_INT8, *last)) if int8 else ((), (*NPU_PREFILL, *last)),
        "chunk": (shared, (*NPU_CHUNK, *last)),
        "decode": (shared, (*NPU_DECODE, *last)),
    }
