"""The table of `kvc8-verify phases`: one prompt, cut in every way that the phases allow.

The NPU programs in float32 stand beside a prompt taken whole that sees what the cache gives back of
it; what they differ by is the order of sums, and with `float` what quantizing the cache costs.

The same cuts of the QUANTIZED program, in float64, must agree in every code: there rounding has no
say (ir/precision/widen.py). That is what shows that a row sees the same whichever way it comes.
"""

from dataclasses import replace

from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.errors import KVC8Error
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program
from kvc8.passes import pipeline
from kvc8.passes.options import Options
from kvc8.tools.verifier.compare import FormRow, LeftOut, compare
from kvc8.tools.verifier.compiled_forms import scales_by
from kvc8.tools.verifier.forms import Tokens, replay

WAYS = {"whole": 0, "chunks of 64": 64, "by tokens": 1}  # to take a prompt
EXACT = tuple(f"{way}, reference f64" for way in WAYS if way != "whole")


def phase_rows(
    checkpoint: Checkpoint, reference: Program, tokens: Tokens
) -> list[FormRow | LeftOut]:
    """Every way to take the prompt, against taking it whole; `reference` is QUANTIZED."""
    double = _double(checkpoint, reference, tokens)
    try:
        return [*_lowered(checkpoint, reference, tokens), *double]
    except KVC8Error as error:
        return [LeftOut("NPU emulated f32", str(error)), *double]


def _lowered(checkpoint: Checkpoint, reference: Program, tokens: Tokens) -> list[FormRow]:
    against, rows = "whole, int8 f32", list[FormRow]()
    by = scales_by(reference)
    same = Options(kv_scales_by=by, prefill_kv="int8", fuse="off")
    int8, _ = pipeline.lower_for_npu(reference, same)
    base = replay(int8, checkpoint, tokens)
    for prefill_kv in ("int8", "float"):
        options = replace(same, prefill_kv=prefill_kv)
        lowered, _ = pipeline.lower_for_npu(reference, options)
        for way, chunk in WAYS.items():
            if (way, prefill_kv) != ("whole", "int8"):
                made = replay(lowered, checkpoint, tokens, chunk)
                rows.append(compare(f"{way}, {prefill_kv} f32", made, against, base, tokens))
    return rows


def _double(checkpoint: Checkpoint, reference: Program, tokens: Tokens) -> list[FormRow]:
    wide = widen(reference)
    whole, *others = (
        replay(dict.fromkeys(("prefill", "chunk", "decode"), wide), checkpoint, tokens, chunk)
        for chunk in WAYS.values()
    )
    return [
        compare(form, made, "whole, reference f64", whole, tokens)
        for form, made in zip(EXACT, others, strict=True)
    ]
