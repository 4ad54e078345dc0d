"""What the NPU ops of lowered programs do, in standard ops: the emulation's arithmetic (see there).

Each body takes a FunctionCall and gives the values of the op's outputs, then of what it writes to.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from kvc8.backends.onnx.attention_functions import fused_infer_attention_score
from kvc8.backends.onnx.builder import Builder, Value
from kvc8.backends.onnx.functions import Body, FunctionCall
from kvc8.backends.onnx.products import point, unsigned
from kvc8.ir import npu
from kvc8.ir.npu_shapes import codes_of, dtype_of
from kvc8.ir.shapes import Op

F32, I64 = torch.float32, torch.int64
FP19 = 0xFFFFE000  # the bits of a float32 that a packed scale keeps
LOW = 0xFFFFFFFF


def quantize(c: FunctionCall) -> Sequence[Value]:
    """npu_quantize: clamp(rint(x / scales + zero_points)), or x * scales without div_mode."""
    c.only("input", "scales", "zero_points", "dtype", "axis", "div_mode")
    if codes_of("npu_quantize", c.number("dtype")) is not torch.int8:
        raise c.refusal("to other codes than int8")
    kind = "Div" if c.others.get("div_mode", True) else "Mul"
    value = c.b.op(kind, c.float32("input"), _along(c, "scales"))
    if "zero_points" in c.tensors:
        value = c.b.op("Add", value, _along(c, "zero_points"))
    return [_codes(c.b, value)]


def _codes(b: Builder, value: Value) -> Value:
    """Clamp(rint(x)) as int8."""
    return b.op("QuantizeLinear", value, b.number(1, F32), None, output_dtype=3)


def _along(c: FunctionCall, name: str) -> Value:
    """A parameter of one value or one a channel, along the axis it belongs to."""
    x, rank = c.float32(name), len(c.types["input"].shape)
    axis = int(c.others.get("axis", 1)) % rank  # type: ignore[call-overload]
    if c.types[name].shape == (1,) or axis == rank - 1:
        return x
    return c.b.op("Reshape", x, [-1, *[1] * (rank - 1 - axis)])


def anti_quant(c: FunctionCall) -> Sequence[Value]:
    """npu_anti_quant: (codes + offset) * scale."""
    c.only("x", "scale", "offset", "dst_dtype")
    value = c.float32("x")
    if "offset" in c.tensors:
        value = c.b.op("Add", value, c.float32("offset"))
    code = c.others.get("dst_dtype")
    assert code is None or isinstance(code, int)
    to = dtype_of("npu_anti_quant", code, torch.float16)
    return [c.b.cast(c.b.op("Mul", value, c.float32("scale")), F32, to)]


def quant_matmul(c: FunctionCall) -> Sequence[Value]:
    """npu_quant_matmul: (x1 @ x2 + bias) * scale, the scale cut to FP19 for float16."""
    c.only("x1", "x2", "scale", "bias", "output_dtype")
    code = c.others.get("output_dtype")
    assert code is None or isinstance(code, int)
    to = dtype_of("npu_quant_matmul", code, torch.int8)
    if to is torch.int8 or c.types.get("bias", c.types["x1"]).dtype.is_floating_point:
        raise c.refusal("with int8 results or a float bias")
    codes, weight = (unsigned(c.b, c.tensor(name)) for name in ("x1", "x2"))
    sums = c.b.op("MatMulInteger", codes, weight, point(c.b), point(c.b))
    if "bias" in c.tensors:
        sums = c.b.op("Add", sums, c.tensor("bias"))
    value = c.b.op("Mul", c.b.cast(sums, torch.int32, F32), _factor(c, to))
    return [c.b.cast(value, F32, to)]


def _factor(c: FunctionCall, to: torch.dtype) -> Value:
    if c.types["scale"].dtype is I64:
        return _from_bits(c.b, c.tensor("scale"))
    if to is torch.float16:
        raise c.refusal("with a scale that is not packed")
    return c.float32("scale")


def _from_bits(b: Builder, bits: Value) -> Value:
    """The float32 of which an int64 holds the bits, cut to FP19, by arithmetic: ONNX has no view.

    Scales are normal numbers: with exponent e and fraction f, (1 + f * 2^-23) * 2^(e - 127), each
    factor and the product exact.
    """
    whole = b.op("BitwiseAnd", bits, b.number(LOW & FP19, I64))
    fraction = b.cast(b.op("Mod", whole, b.number(1 << 23, I64)), I64, F32)
    shifted = b.op("Div", whole, b.number(1 << 23, I64))
    exponent = b.cast(b.op("Mod", shifted, b.number(256, I64)), I64, F32)
    power = b.op("Pow", b.number(2, F32), b.op("Sub", exponent, b.number(127, F32)))
    one = b.op("Add", b.op("Mul", fraction, b.number(2.0**-23, F32)), b.number(1, F32))
    size = b.op("Mul", one, power)
    negative = b.op("GreaterOrEqual", shifted, b.number(256, I64))
    signed = b.op("Where", negative, b.op("Neg", size), size)
    return b.op("Where", b.op("Equal", whole, b.number(0, I64)), b.number(0, F32), signed)


def rms_norm(c: FunctionCall) -> Sequence[Value]:
    """npu_rms_norm: (x * rstd * gamma, rstd)."""
    c.only("input", "gamma", "epsilon")
    x, rank = c.float32("input"), len(c.types["gamma"].shape)
    rstd = _rstd(c, x, rank)
    normed = c.b.op("Mul", c.b.op("Mul", x, rstd), c.float32("gamma"))
    return [c.b.cast(normed, F32, c.types["input"].dtype), rstd]


def add_rms_norm(c: FunctionCall) -> Sequence[Value]:
    """npu_add_rms_norm: (norm of x1 + x2, rstd, x1 + x2)."""
    c.only("x1", "x2", "gamma", "epsilon")
    dtype, total = c.types["x1"].dtype, c.b.op("Add", c.tensor("x1"), c.tensor("x2"))
    x = c.b.cast(total, dtype, F32)
    rstd = _rstd(c, x, len(c.types["gamma"].shape))
    normed = c.b.op("Mul", c.b.op("Mul", x, rstd), c.float32("gamma"))
    return [c.b.cast(normed, F32, dtype), rstd, total]


def rms_norm_quant(c: FunctionCall) -> Sequence[Value]:
    """npu_rms_norm_quant: clamp(rint(half((x * rstd * gamma + beta) * (1 / scale) + offset)))."""
    c.only("x", "gamma", "beta", "scale", "offset", "epsilon", "dst_dtype")
    x = c.float32("x")
    gamma, beta = (c.b.op("Reshape", c.float32(name), [-1]) for name in ("gamma", "beta"))
    normed = c.b.op("Mul", c.b.op("Mul", x, _rstd(c, x, 1)), gamma)  # [1, D] is one row too
    normed = c.b.op("Add", normed, beta)
    value = c.b.op("Mul", normed, c.b.op("Reciprocal", c.float32("scale")))
    value = c.b.op("Add", value, c.float32("offset"))
    if c.types["x"].dtype is not F32:
        value = c.b.cast(c.b.cast(value, F32, torch.float16), torch.float16, F32)
    return [_codes(c.b, value)]


def add_rms_norm_quant(c: FunctionCall) -> Sequence[Value]:
    """npu_add_rms_norm_quant: (codes with scales1, codes with scales2 or zeros, x1 + x2)."""
    c.only(
        *("x1", "x2", "gamma", "scales1", "zero_points1", "scales2", "zero_points2", "beta"),
        *("axis", "epsilon", "div_mode", "dst_type"),
    )
    dtype, total = c.types["x1"].dtype, c.b.op("Add", c.tensor("x1"), c.tensor("x2"))
    x = c.b.cast(total, dtype, F32)
    rstd = _rstd(c, x, len(c.types["gamma"].shape))
    normed = c.b.cast(c.b.op("Mul", x, rstd), F32, dtype)
    normed = c.b.op("Mul", normed, c.tensor("gamma"))
    if "beta" in c.tensors:
        normed = c.b.op("Add", normed, c.tensor("beta"))
    value, kind = c.b.cast(normed, dtype, F32), "Div" if c.others.get("div_mode", True) else "Mul"
    made: list[Value] = []
    for i in (1, 2):
        if f"scales{i}" not in c.tensors:
            made.append(c.b.op("Mul", made[0], c.b.number(0, torch.int8)))
            continue
        scaled = c.b.op(kind, value, c.float32(f"scales{i}"))
        if f"zero_points{i}" in c.tensors:
            scaled = c.b.op("Add", scaled, c.float32(f"zero_points{i}"))
        made.append(_codes(c.b, scaled))
    return [*made, total]


def _rstd(c: FunctionCall, x: Value, rank: int) -> Value:
    epsilon = c.others.get("epsilon", 1e-6)
    assert isinstance(epsilon, float)
    mean = c.b.op("ReduceMean", c.b.op("Mul", x, x), list(range(-rank, 0)), keepdims=1)
    return c.b.op("Reciprocal", c.b.op("Sqrt", c.b.op("Add", mean, c.b.number(epsilon, F32))))


def rotary_mul(c: FunctionCall) -> Sequence[Value]:
    """npu_rotary_mul: x * cos + [-x_high, x_low] * sin, in float16 for float16."""
    c.only("input", "r1", "r2")
    dtype = c.types["input"].dtype
    wide = torch.float16 if dtype is torch.float16 else F32
    x, cos, sin = (c.b.cast(c.tensor(n), c.types[n].dtype, wide) for n in ("input", "r1", "r2"))
    return [c.b.cast(rotated(c.b, x, cos, sin, int(c.types["input"].shape[-1])), wide, dtype)]


def rotated(b: Builder, x: Value, cos: Value, sin: Value, width: int) -> Value:
    """The rotation of the halves of the last dimension."""
    low = b.op("Slice", x, [0], [width // 2], [-1])
    high = b.op("Slice", x, [width // 2], [width], [-1])
    turned = b.op("Concat", b.op("Neg", high), low, axis=-1)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))


def swiglu(c: FunctionCall) -> Sequence[Value]:
    """npu_swiglu: silu(first half) * second half of the last dimension."""
    c.only("input", "dim")
    rank = len(c.types["input"].shape)
    if int(c.others.get("dim", -1)) % rank != rank - 1:  # type: ignore[call-overload]
        raise c.refusal("along another dimension than the last")
    left, right = _halves(c, c.float32("input"), "input")
    value = c.b.op("Mul", c.b.op("Mul", left, c.b.op("Sigmoid", left)), right)
    return [c.b.cast(value, F32, c.types["input"].dtype)]


def geglu(c: FunctionCall) -> Sequence[Value]:
    """npu_geglu: (gelu(gate) * up, gelu(gate)), of halves of the last dimension."""
    c.only("input", "dim", "approximate", "activate_left")
    rank, dtype = len(c.types["input"].shape), c.types["input"].dtype
    if int(c.others.get("dim", -1)) % rank != rank - 1:  # type: ignore[call-overload]
        raise c.refusal("along another dimension than the last")
    left, right = _halves(c, c.float32("input"), "input")
    gate, up = (left, right) if c.others.get("activate_left", False) else (right, left)
    wide = c.b.op("Gelu", gate, approximate="tanh" if c.others.get("approximate", 1) else "none")
    narrow = c.b.cast(wide, F32, dtype)
    factor = c.b.cast(narrow, dtype, F32) if dtype is torch.float16 else wide
    return [c.b.cast(c.b.op("Mul", factor, up), F32, dtype), narrow]


def _halves(c: FunctionCall, x: Value, name: str) -> tuple[Value, Value]:
    width = int(c.types[name].shape[-1])
    first = c.b.op("Slice", x, [0], [width // 2], [-1])
    return first, c.b.op("Slice", x, [width // 2], [width], [-1])


def dequant_swiglu_quant(c: FunctionCall) -> Sequence[Value]:
    """npu_dequant_swiglu_quant in quant_mode 0: (clamp(rint(swiglu / scale + offset)), zeros)."""
    known = ("x", "weight_scale", "bias", "quant_scale", "quant_offset", "quant_mode", "dst_type")
    c.only(*known, "activate_left")
    if c.others.get("quant_mode", 0) != 0:
        raise c.refusal("quantizing each token")
    sums = c.tensor("x")
    if "bias" in c.tensors and c.types["bias"].dtype is not torch.int32:
        raise c.refusal("with a float bias")
    if "bias" in c.tensors:
        sums = c.b.op("Add", sums, c.tensor("bias"))
    value = c.b.cast(sums, c.types["x"].dtype, F32)
    if "weight_scale" in c.tensors:
        value = c.b.op("Mul", value, c.float32("weight_scale"))
    left, right = _halves(c, value, "x")
    gate, up = (left, right) if c.others.get("activate_left", False) else (right, left)
    value = c.b.op("Mul", c.b.op("Mul", gate, c.b.op("Sigmoid", gate)), up)
    value = c.b.op("Div", value, c.float32("quant_scale"))
    if "quant_offset" in c.tensors:
        value = c.b.op("Add", value, c.float32("quant_offset"))
    zeros = c.b.op("Expand", c.b.number(0, F32), c.b.op("Shape", sums, end=-1))
    return [_codes(c.b, value), zeros]


def scatter_pa_kv_cache(c: FunctionCall) -> Sequence[Value]:
    """npu_scatter_pa_kv_cache in mode Norm: rows to flat slots; a negative slot writes nothing."""
    c.only("key", "value", "key_cache", "value_cache", "slot_mapping", "cache_mode")
    if c.others.get("cache_mode") != "Norm":
        raise c.refusal("in another cache_mode than Norm")
    slots = c.b.cast(c.tensor("slot_mapping"), c.types["slot_mapping"].dtype, I64)
    pairs = (("key", "key_cache"), ("value", "value_cache"))
    return [written(c.b, c.tensor(cache), c.tensor(rows), slots) for rows, cache in pairs]


def written(b: Builder, cache: Value, rows: Value, slots: Value) -> Value:
    """The cache [blocks, block_size, heads, dim] with rows [T, heads, dim] at slots, int64 [T]."""
    real = b.op("Squeeze", b.op("NonZero", b.op("GreaterOrEqual", slots, b.number(0, I64))), [0])
    at, block = b.op("Gather", slots, real), b.op("Shape", cache, start=1, end=2)
    place = [b.op("Unsqueeze", b.op(kind, at, block), [1]) for kind in ("Div", "Mod")]
    picked = b.op("Gather", rows, real, axis=0)
    return b.op("ScatterND", cache, b.op("Concat", *place, axis=1), picked)


def rope_quant_kvcache(c: FunctionCall) -> Sequence[Value]:
    """npu_rope_quant_kvcache over pages: (q and, if wanted, k rotated, v, and the caches twice)."""
    known = ("x", "cos", "sin", "k_cache", "v_cache", "indices", "scale_k", "scale_v")
    options = ("size_splits", "offset_k", "offset_v", "cache_mode")
    c.only(*known, *options, "kv_output")
    sizes, dim = c.others["size_splits"], int(c.types["k_cache"].shape[3])
    if c.others.get("cache_mode") != "page" or len(c.types["x"].shape) != 2:
        raise c.refusal("of another form than pages and rows [T, width]")
    assert isinstance(sizes, list | tuple)
    dtype = c.types["x"].dtype
    wide = torch.float16 if dtype is torch.float16 else F32
    x, start, parts = c.b.cast(c.tensor("x"), dtype, wide), 0, []
    for width in sizes:
        part = c.b.op("Slice", x, [start], [start + int(width)], [-1])
        parts.append(c.b.op("Reshape", part, [0, -1, dim]))
        start += int(width)
    cos, sin = (
        c.b.op("Unsqueeze", c.b.cast(c.tensor(n), c.types[n].dtype, wide), [1])
        for n in ("cos", "sin")
    )
    q, k = (rotated(c.b, part, cos, sin, dim) for part in parts[:2])
    slots = c.b.cast(c.tensor("indices"), c.types["indices"].dtype, I64)
    caches = []
    for name, rows in (("k", k), ("v", parts[2])):
        value = c.b.op("Div", c.b.cast(rows, wide, F32), c.float32(f"scale_{name}"))
        if f"offset_{name}" in c.tensors:
            value = c.b.op("Add", value, c.float32(f"offset_{name}"))
        caches.append(written(c.b, c.tensor(f"{name}_cache"), _codes(c.b, value), slots))
    given = [c.b.cast(part, wide, dtype) for part in (q, k, parts[2])]
    if not c.others.get("kv_output", False):
        none = c.b.op("Slice", c.b.op("Reshape", c.tensor("x"), [-1]), [0], [0], [0])
        given[1:] = [none, none]
    return [*given, *caches, *caches]


BODIES: Mapping[Op, Body] = MappingProxyType(
    {
        npu.npu_quantize: quantize,
        npu.npu_anti_quant: anti_quant,
        npu.npu_quant_matmul: quant_matmul,
        npu.npu_rms_norm: rms_norm,
        npu.npu_add_rms_norm: add_rms_norm,
        npu.npu_add_rms_norm_quant: add_rms_norm_quant,
        npu.npu_rms_norm_quant: rms_norm_quant,
        npu.npu_rotary_mul: rotary_mul,
        npu.npu_swiglu: swiglu,
        npu.npu_dequant_swiglu_quant: dequant_swiglu_quant,
        npu.npu_geglu: geglu,
        npu.npu_scatter_pa_kv_cache: scatter_pa_kv_cache,
        npu.npu_scatter_pa_kv_cache_functional: scatter_pa_kv_cache,
        npu.npu_rope_quant_kvcache: rope_quant_kvcache,
        npu.npu_fused_infer_attention_score: fused_infer_attention_score,
    }
)
# The arguments that an op writes to in place, in the order in which its body gives them.
WRITES: Mapping[Op, tuple[str, ...]] = MappingProxyType(
    {
        npu.npu_scatter_pa_kv_cache: ("key_cache", "value_cache"),
        npu.npu_rope_quant_kvcache: ("k_cache", "v_cache"),
    }
)
