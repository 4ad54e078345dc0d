"""The ops of a 70B-shaped layer, at the sizes of decode and of a prompt, against their bounds.

A bound is what the cost report says (backends/npu/cost.py): each operand read once at the chip's
bandwidth, or the operations at its rate. Shapes are Llama-3.1-70B's, whole and of a rank of eight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem

from kvc8.backends.npu.cost import costs
from kvc8.backends.workload import Device, Workload
from kvc8.ir.program import type_of
from kvc8.tools.device_checker.calls import SpelledCall, call_of, program_of

HIDDEN, WIDTH, HEADS, KV_HEADS, DIM = 8192, 28672, 64, 8, 128
BATCHES, CONTEXTS, PROMPT, BLOCK = (1, 16, 64), (1024, 8192, 32768), 4096, 128
TAKEN = {"npu_add_rms_norm_quant": (0, 2)}  # of an op's results, where not the first alone
MASK = 2048  # the side of the mask that attention takes for prompts of any length


@dataclass(frozen=True)
class TimedCall:
    """A call to be timed."""

    name: str
    call: SpelledCall
    workload: Workload
    phase: str = "decode"

    @property
    def bound(self) -> float:
        """The seconds that it takes at least."""
        program = program_of(self.call)
        [output] = [node for node in program.graph.nodes if node.op == "output"]
        call = call_of(program)
        if type_of(call) and isinstance(type_of(call), tuple):  # what nobody takes counts nothing
            places = TAKEN.get(self.call.op, (0,))
            output.args = ([program.call(output, getitem, call, i) for i in places],)
        found = costs(program, self.phase, self.workload, Device())
        return sum(cost.seconds for _, cost in found)


def timed_calls(*, small: bool) -> list[TimedCall]:
    """All calls; with `small` a few of a size that a CPU computes in a moment."""
    if small:
        attention = [_decode(2, 256, 8, 64), _prompt(8, 8, 64)]
        return [*_linears(2, 8, 64), *_rows(2, 8, 64), *attention]
    found: list[TimedCall] = []
    for ranks in (1, 8):
        for tokens in (*BATCHES, PROMPT):
            found += [*_linears(tokens, ranks), *_rows(tokens, ranks)]
        found += [_decode(batch, context, ranks) for batch in BATCHES for context in CONTEXTS]
        found.append(_prompt(PROMPT, ranks))
    return found


def _linears(tokens: int, ranks: int, part: int = 1) -> Iterator[TimedCall]:
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
        arguments = {
            "x1": f"i8[{tokens}, {inner}]",
            "x2": f"i8[{inner}, {outer}]",
            "scale": f"i64[{outer}]",
            "bias": f"i32[{outer}]",
            "output_dtype": 5,
        }
        yield _of("npu_quant_matmul", arguments, tokens, ranks, name)


def _rows(tokens: int, ranks: int, part: int = 1) -> Iterator[TimedCall]:
    """What is of rows: norm, rotation, the write to the cache, SwiGLU, each with its quantizer."""
    wide, half, heads, kv = (
        HIDDEN // part,
        WIDTH // ranks // part,
        HEADS // ranks,
        KV_HEADS // ranks,
    )
    row, rope = f"f16[{tokens}, {wide}]", f"f16[1, {tokens}, 1, {DIM}]"
    each = {"scales1": f"f32[{wide}]", "zero_points1": f"i32[{wide}]"}
    norm = {"x1": row, "x2": row, "gamma": f"f16[{wide}]", **each}
    yield _of("npu_add_rms_norm_quant", norm, tokens, ranks)
    x = f"f16[{tokens}, {2 * half}]"
    swiglu = {"x": x, "quant_scale": f"f32[1, {half}]", "activate_left": True}
    yield _of("npu_dequant_swiglu_quant", swiglu, tokens, ranks)
    quantize = {"input": row, "scales": f"f32[{wide}]", "zero_points": f"i32[{wide}]"}
    yield _of("npu_quantize", {**quantize, "dtype": 1, "axis": -1}, tokens, ranks)
    pages = f"i8[4*N, S, {kv}, {DIM}]"
    if ranks == 1:  # more heads than the op takes that does all of it
        rotary = {"input": f"f16[1, {tokens}, {heads}, {DIM}]", "r1": rope, "r2": rope}
        yield _of("npu_rotary_mul", rotary, tokens, ranks)
        codes = f"i8[{tokens}, {kv}, {DIM}]"
        write = {"key": codes, "value": codes, "key_cache": pages, "value_cache": pages}
        write |= {"slot_mapping": f"i32[{tokens}]", "cache_mode": "Norm"}
        yield _of("npu_scatter_pa_kv_cache", write, tokens, ranks)
        return
    sizes = [heads * DIM, kv * DIM, kv * DIM]
    angle, scale = f"f16[{tokens}, {DIM}]", f"f32[{kv}, {DIM}]"
    cache = {"x": f"f16[{tokens}, {sum(sizes)}]", "cos": angle, "sin": angle, "k_cache": pages}
    cache |= {"v_cache": pages, "indices": f"i32[{tokens}]", "scale_k": scale, "scale_v": scale}
    cache_write = {**cache, "size_splits": sizes, "cache_mode": "page"}
    yield _of("npu_rope_quant_kvcache", cache_write, tokens, ranks)
    sums = {"x": f"i32[{tokens}, {wide}]", "weight_scale": f"f32[{wide}]"}
    yield _of("npu_dequant_bias", sums, tokens, ranks)


def _decode(batch: int, context: int, ranks: int, part: int = 1) -> TimedCall:
    """Decode over int8 pages in BSH."""
    heads, kv_heads = _heads(ranks, part)
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
    name = f"attention, {batch} of {context:,} tokens{_rank(ranks)}"
    return TimedCall(name, call, Workload(batch, context, BLOCK))


def _prompt(tokens: int, ranks: int, part: int = 1) -> TimedCall:
    """A prompt over its own float rows, in TND, as prefill has it."""
    heads, kv_heads = _heads(ranks, part)
    rows = f"f16[{tokens}, {kv_heads}, {DIM}]"
    arguments = {
        "query": f"f16[{tokens}, {heads}, {DIM}]",
        "key": rows,
        "value": rows,
        "atten_mask": f"b8[{MASK}, {MASK}]",
        "actual_seq_lengths": "ints[1]",
        "actual_seq_lengths_kv": "ints[1]",
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "input_layout": "TND",
        "sparse_mode": 3,
    }
    call = SpelledCall("npu_fused_infer_attention_score", arguments, BLOCK)
    name = f"attention, a prompt of {tokens:,} tokens{_rank(ranks)}"
    return TimedCall(name, call, Workload(1, tokens, BLOCK), "prefill")


def _heads(ranks: int, part: int) -> tuple[int, int]:
    return max(HEADS // ranks // part, 1), max(KV_HEADS // ranks // part, 1)


def _of(
    op: str, arguments: Mapping[str, object], tokens: int, ranks: int, name: str = ""
) -> TimedCall:
    title = f"{name or op}, {tokens:,} token{'s' * (tokens > 1)}{_rank(ranks)}"
    return TimedCall(title, SpelledCall(op, arguments, BLOCK), Workload(tokens, block_size=BLOCK))


def _rank(ranks: int) -> str:
    return f", a rank of {ranks}" if ranks > 1 else ""
