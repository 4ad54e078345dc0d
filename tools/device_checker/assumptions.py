"""What the emulation rests on, numbered as in docs/device.md, and a call that settles each.

A call is made so that another reading would give other numbers: values far beyond the range where
saturation is in question, scales with low bits where they may be cut, short sums of many rows where
it is the place of a rounding. What another order of sums may move at most is in bounds.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from kvc8.tools.device_checker.bounds import Within
from kvc8.tools.device_checker.calls import SpelledCall, tensors
from kvc8.tools.device_checker.comparison import BY_MORE, EQUAL, Apart

Values = dict[str, Any]
Judge = Literal["exact", "rounding", "near"]


@dataclass(frozen=True)
class Assumption:
    """A statement about an op, and the call that tells."""

    op: str
    says: str
    read_in_a_source: bool  # or assumed
    arguments: Mapping[str, Any]
    change: Callable[[Values], object] = lambda _: None  # of the seeded values
    judge: Judge = "exact"

    @property
    def call(self) -> SpelledCall:
        """The call."""
        return SpelledCall(self.op, self.arguments)

    def values(self) -> Values:
        """Its arguments."""
        made = tensors(self.call)
        self.change(made)
        return made

    def holds(self, found: Apart, within: Within) -> bool:
        """Whether what the device gave agrees with the statement."""
        few = round(found.share * found.values) <= within.at_most(found.values)
        return {
            "exact": found.outcome == EQUAL,
            "rounding": found.outcome != BY_MORE and few,
            "near": found.outcome != BY_MORE,
        }[self.judge]


def _quantized(values: Values) -> None:
    """Values of up to 100 steps, where x/s and x*(1/s) part once in two hundred."""
    steps = torch.arange(values["input"].numel()).reshape(values["input"].shape) % 401 - 200
    values["input"] = (steps / 2 * values["scales"].float()).half()
    values["zero_points"].zero_()


def _saturating(values: Values) -> None:
    values["input"] = values["input"].sign() * 1000


def _low_bits(values: Values) -> None:
    """Scales whose 19 upper bits are followed by ones, and sums that half precision holds."""
    bits = values["scale"] & ~0x1FFF | 0x1FFF
    values["scale"] = bits
    values["bias"].zero_()


def _nothing_past(values: Values) -> None:
    values["actual_seq_lengths"], values["actual_seq_lengths_kv"] = [3, 8], [3, 8]


def _negative_slot(values: Values) -> None:
    values["slot_mapping"][1] = -1


def _zero_row(values: Values) -> None:
    values["input"][1] = 0


def _half_ways(values: Values) -> None:
    """Scales halfway between two of 19 bits."""
    values["scale"] = (values["scale"].view(torch.int32) & ~0x1FFF | 0x1000).view(torch.float32)


def _with(arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {**arguments, **more}


QUANTIZE = {"input": "f16[T, 4096]", "scales": "f32[4096]", "zero_points": "i32[4096]",
            "dtype": 1, "axis": -1}  # fmt: skip
MATMUL = {"x1": "i8[T, 64]", "x2": "i8[64, 256]", "scale": "i64[256]", "bias": "i32[256]",
          "output_dtype": 5}  # fmt: skip
PAGES = {"query": "bf16[T, 1, 1280]", "key": "i8[N, S, 128]", "value": "i8[N, S, 128]",
         "actual_seq_lengths_kv": "ints[T]", "block_table": "i32[T, M]", "num_heads": 10,
         "num_key_value_heads": 1, "input_layout": "BSH", "key_antiquant_scale": "bf16[128]",
         "value_antiquant_scale": "bf16[128]", "inner_precise": 1}  # fmt: skip
NZ_PAGES = _with(PAGES, key="i8[N, 1, 4, S, 32]", value="i8[N, 1, 4, S, 32]",
                 key_antiquant_scale="bf16[1, 128]",
                 value_antiquant_scale="bf16[1, 128]")  # fmt: skip
OFFSETS = {"key_antiquant_offset": "bf16[128]", "value_antiquant_offset": "bf16[128]"}
PADDED = {"query": "f16[B, 8, 256]", "key": "f16[B, 8, 128]", "value": "f16[B, 8, 128]",
          "actual_seq_lengths": "ints[B]", "actual_seq_lengths_kv": "ints[B]", "num_heads": 4,
          "num_key_value_heads": 2, "input_layout": "BSH"}  # fmt: skip
ATB_PAGES = {"query": "f16[T, 4, 64]", "key_cache": "i8[N, S, 2, 64]",
             "value_cache": "i8[N, S, 2, 64]", "num_kv_heads": 2, "num_heads": 4,
             "scale_value": 0.125, "block_table": "i32[T, M]", "context_lens": "i32[T]",
             "quant_type": 1, "outdata_type": 1, "k_descale": "f32[128]", "v_descale": "f32[128]",
             "out": "f16[T, 4, 64]"}  # fmt: skip
WRITE = {"key": "i8[T, 2, 32]", "value": "i8[T, 2, 32]", "key_cache": "i8[N, S, 2, 32]",
         "value_cache": "i8[N, S, 2, 32]", "slot_mapping": "i32[T]",
         "cache_mode": "Norm"}  # fmt: skip
WRITE_NZ = _with(WRITE, key_cache="i8[N, 2, S, 32]", value_cache="i8[N, 2, S, 32]",
                 cache_mode="PA_NZ")  # fmt: skip
NORM = {"input": "f16[24*T, 64]", "gamma": "f16[64]"}
ADD_NORM = {"x1": "f16[24*T, 64]", "x2": "f16[24*T, 64]", "gamma": "f16[64]"}
NORM_QUANT = {"x": "f16[24*T, 64]", "gamma": "f16[64]", "beta": "f16[64]", "scale": "f16[1]",
              "offset": "i8[1]"}  # fmt: skip
ADD_NORM_QUANT = {"x1": "bf16[24*T, 64]", "x2": "bf16[24*T, 64]", "gamma": "bf16[64]",
                  "scales1": "bf16[64]", "zero_points1": "bf16[64]"}  # fmt: skip
ROTARY = {"input": "bf16[1, T, 4, 128]", "r1": "bf16[1, T, 1, 128]", "r2": "bf16[1, T, 1, 128]"}
ROPE = {"x": "f16[T, 4096]", "cos": "f16[T, 128]", "sin": "f16[T, 128]",
        "k_cache": "i8[N, S, 4, 128]", "v_cache": "i8[N, S, 4, 128]", "indices": "i32[T]",
        "scale_k": "f32[4, 128]", "scale_v": "f32[4, 128]", "size_splits": [3072, 512, 512],
        "cache_mode": "page"}  # fmt: skip
QKV = {"qkv": "bf16[T, 2560]", "q_gamma": "bf16[128]", "k_gamma": "bf16[128]",
       "cos": "bf16[T, 128]", "sin": "bf16[T, 128]", "index": "i64[T]", "q_out": "bf16[T, 2048]",
       "k_cache": "i8[N, 8, S, 32]", "v_cache": "i8[N, 8, S, 32]", "qkv_size": [1, 3, 20, 128],
       "head_nums": [16, 2, 2], "k_scale": "f32[2, 128]", "v_scale": "f32[2, 128]"}  # fmt: skip
SWIGLU = {"x": "f16[T, 512]", "quant_scale": "f32[1, 256]", "activate_left": True}
INT_SWIGLU = {"x": "i32[T, 512]", "weight_scale": "f32[1, 512]", "quant_scale": "f32[1, 256]",
              "activate_left": True}  # fmt: skip

ASSUMPTIONS = (
    Assumption("npu_quantize", "divides, in float32: rint(x/s + z)", True, QUANTIZE, _quantized),
    Assumption("npu_quantize", "saturates at -128 and 127", False, QUANTIZE, _saturating),
    Assumption(
        "npu_anti_quant", "is float32 inside and rounds once", False,
        {"x": "i8[T, 64]", "scale": "f32[64]", "offset": "f32[64]", "dst_dtype": 5},
    ),
    Assumption(
        "npu_quant_matmul", "reads an int64 scale as a float of 19 bits", True, MATMUL, _low_bits
    ),
    Assumption(
        "npu_quant_matmul", "adds a float bias after the scales", False,
        _with(MATMUL, scale="f32[256]", bias="f32[256]", output_dtype=15), judge="rounding",
    ),
    Assumption(
        "npu_trans_quant_param", "with round_mode 1 rounds half to even", False,
        {"scale": "f32[64]", "round_mode": 1}, _half_ways,
    ),
    Assumption(
        "npu_dynamic_quant", "gives a row of zeros the scale 0", False, {"input": "f16[T, 64]"},
        _zero_row,
    ),
    Assumption(
        "npu_scatter_pa_kv_cache", "writes NZ as [blocks, width/32, block size, 32]", True, WRITE_NZ
    ),
    Assumption(
        "npu_scatter_pa_kv_cache", "writes nothing for a negative slot", True, WRITE, _negative_slot
    ),
    Assumption(
        "npu_fused_infer_attention_score", "computes (code + offset)*scale", True,
        _with(PAGES, **OFFSETS), judge="near",
    ),
    Assumption(
        "npu_fused_infer_attention_score", "is float32 inside up to its last bits", False, PAGES,
        judge="near",
    ),
    Assumption(
        "npu_fused_infer_attention_score", "reads NZ as [blocks, heads, D/32, block size, 32]",
        True, NZ_PAGES, judge="near",
    ),
    Assumption(
        "npu_fused_infer_attention_score", "gives zeros past a sequence's end", False, PADDED,
        _nothing_past, "near",
    ),
    Assumption(
        "_npu_paged_attention_quant", "computes code*scale", True, ATB_PAGES, judge="near"
    ),
    Assumption("npu_rms_norm", "is float32 inside and rounds once", False, NORM, judge="rounding"),
    Assumption(
        "npu_add_rms_norm", "rounds x1 + x2 to its dtype, then once", False, ADD_NORM,
        judge="rounding",
    ),
    Assumption("npu_rms_norm_quant", "divides by its scale", True, NORM_QUANT, judge="rounding"),
    Assumption(
        "npu_add_rms_norm_quant", "in bfloat16 rounds after x*rstd and after *gamma", False,
        ADD_NORM_QUANT, judge="rounding",
    ),
    Assumption(
        "npu_add_rms_norm_quant", "adds a beta after them", False,
        _with(ADD_NORM_QUANT, beta="bf16[64]"), judge="rounding",
    ),
    Assumption("npu_rotary_mul", "computes bfloat16 in float32", False, ROTARY),
    Assumption(
        "npu_rotary_mul", "computes float16 in float16", True,
        {name: type_.replace("bf16", "f16") for name, type_ in ROTARY.items()},
    ),
    Assumption("npu_rope_quant_kvcache", "divides by its scales", True, ROPE),
    Assumption(
        "npu_dequant_rope_quant_kvcache", "adds a float bias after the scales", False,
        _with(ROPE, x="i32[T, 4096]", weight_scale="f32[4096]", bias="f32[4096]"),
    ),
    Assumption(
        "npu_qkv_rms_norm_rope_cache", "is float32 from the norm to the codes", False, QKV,
        judge="rounding",
    ),
    Assumption("npu_swiglu", "rounds nothing between", False, {"input": "f16[T, 512]"},
               judge="rounding"),
    Assumption(
        "npu_swiglu_quant", "multiplies by its scale", True,
        {"x": "f16[T, 512]", "smooth_scales": "f32[1, 256]"}, judge="rounding",
    ),
    Assumption("npu_dequant_swiglu_quant", "divides by its scale", True, SWIGLU, judge="rounding"),
    Assumption(
        "npu_dequant_swiglu_quant", "adds an int32 bias before the scales", False,
        _with(INT_SWIGLU, bias="i32[512]"), judge="rounding",
    ),
    Assumption(
        "npu_dequant_swiglu_quant", "adds a float bias after the scales", False,
        _with(INT_SWIGLU, bias="f32[512]"), judge="rounding",
    ),
    Assumption(
        "npu_geglu", "in float16 rounds gelu before it multiplies", True,
        {"input": "f16[T, 512]", "activate_left": True}, judge="rounding",
    ),
    Assumption(
        "npu_geglu", "in bfloat16 multiplies before it rounds", True,
        {"input": "bf16[T, 512]", "activate_left": True}, judge="rounding",
    ),
)  # fmt: skip
NUMBERED: Mapping[int, Assumption] = MappingProxyType(dict(enumerate(ASSUMPTIONS, 1)))


def table() -> list[str]:
    """The rows of docs/device.md."""
    kinds = {True: "read in a source", False: "assumed"}
    return [
        f"| A{number} | `{each.op}` | {each.says} | {kinds[each.read_in_a_source]} |"
        for number, each in NUMBERED.items()
    ]
