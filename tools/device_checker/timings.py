"""The ops of a 70B-shaped layer, at the sizes of decode and of a prompt, against their bounds.

A bound is what the cost report says (backends/npu/cost.py): each operand read once at the chip's
bandwidth, or the operations at its rate. Shapes are Llama-3.1-70B's, whole and of a rank of eight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvc8.backends.npu.cost import Device, Workload, costs
from kvc8.tools.device_checker.calls import SpelledCall, program_of

HIDDEN, WIDTH, HEADS, KV_HEADS, DIM = 8192, 28672, 64, 8, 128
BATCHES, CONTEXTS, PROMPT, BLOCK = (1, 16, 64), (1024, 8192, 32768), 4096, 128


@dataclass(frozen=True)
class TimedCall:
    """A call to be timed."""

    name: str
    call: SpelledCall
    tokens: int

    @property
    def bound(self) -> float:
        """The seconds that it takes at least."""
        program = program_of(self.call)
        found = costs(program, "decode", Workload(batch=self.tokens, block_size=BLOCK), Device())
        moved = sum(cost.seconds for _, cost in found)
        return moved


def timed_calls(*, small: bool) -> list[TimedCall]:
    """All calls; with `small` a few of a size that a CPU computes in a moment."""
    if small:
        return [*_linears(2, 1, 64), _attention(2, 256, 1, kv_heads=1), *_rows(2, 1, 64)]
    found: list[TimedCall] = []
    for ranks in (1, 8):
        for tokens in (*BATCHES, PROMPT):
            found += [*_linears(tokens, ranks, 1), *_rows(tokens, ranks, 1)]
        found += [
            _attention(batch, context, ranks)
            for batch in BATCHES
            for context in CONTEXTS
            if batch * context <= BATCHES[-1] * CONTEXTS[1]
        ]
    return found


def _linears(tokens: int, ranks: int, part: int) -> Iterator[TimedCall]:
    """q|k|v, o, gate|up and down; `part` divides all sizes."""
    qkv = (HEADS + 2 * KV_HEADS) * DIM // ranks
    sizes = {
        "q|k|v": (HIDDEN, qkv),
        "o": (HEADS * DIM // ranks, HIDDEN),
        "gate|up": (HIDDEN, 2 * WIDTH // ranks),
        "down": (WIDTH // ranks, HIDDEN),
    }
    for name, size in sizes.items():
        inner, outer = (each // part for each in size)
        call = SpelledCall(
            "npu_quant_matmul",
            {
                "x1": f"i8[{tokens}, {inner}]",
                "x2": f"i8[{inner}, {outer}]",
                "scale": f"i64[{outer}]",
                "bias": f"i32[{outer}]",
                "output_dtype": 5,
            },
        )
        yield TimedCall(f"{name}, {tokens} tokens{_of(ranks)}", call, tokens)


def _rows(tokens: int, ranks: int, part: int) -> Iterator[TimedCall]:
    """What is of rows: the norm with its quantizer, and SwiGLU with its own."""
    wide = HIDDEN // part
    norm = {
        "x1": f"f16[{tokens}, {wide}]",
        "x2": f"f16[{tokens}, {wide}]",
        "gamma": f"f16[{wide}]",
        "scales1": f"f32[{wide}]",
        "zero_points1": f"i32[{wide}]",
    }
    half = WIDTH // ranks // part
    swiglu = {
        "x": f"f16[{tokens}, {2 * half}]",
        "quant_scale": f"f32[1, {half}]",
        "activate_left": True,
    }
    for op, arguments in (("npu_add_rms_norm_quant", norm), ("npu_dequant_swiglu_quant", swiglu)):
        yield TimedCall(f"{op}, {tokens} tokens{_of(ranks)}", SpelledCall(op, arguments), tokens)


def _attention(batch: int, context: int, ranks: int, kv_heads: int = KV_HEADS) -> TimedCall:
    """Decode over int8 pages in BSH."""
    heads, kv_heads = HEADS // ranks, max(kv_heads // ranks, 1)
    blocks, width = -(-context // BLOCK), kv_heads * DIM
    pages = f"i8[{batch * blocks}, {BLOCK}, {width}]"
    arguments = {
        "query": f"f16[{batch}, 1, {heads * DIM}]",
        "key": pages,
        "value": pages,
        "actual_seq_lengths_kv": f"ints[{batch}]",
        "block_table": f"i32[{batch}, {blocks}]",
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "input_layout": "BSH",
        "key_antiquant_scale": f"f16[{width}]",
        "value_antiquant_scale": f"f16[{width}]",
    }
    call = SpelledCall("npu_fused_infer_attention_score", arguments, BLOCK)
    return TimedCall(f"attention, {batch} of {context:,} tokens{_of(ranks)}", call, batch)


def _of(ranks: int) -> str:
    return f", a rank of {ranks}" if ranks > 1 else ""
