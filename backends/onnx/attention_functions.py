"""npu_fused_infer_attention_score in standard ops, as the emulation on a CPU has it.

Decode reads int8 or float pages, one query a sequence; prefill sees the rows beside it, one prompt
in layout BSH or several end to end in TND. Weights are divided by their sum after they met the
values, and rounded to the dtype of the query before.
"""

from collections.abc import Sequence

import torch

from kvc8.backends.onnx.builder import Builder, Value
from kvc8.backends.onnx.functions import FunctionCall

F32, I64 = torch.float32, torch.int64
KNOWN = (
    *("query", "key", "value", "atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv"),
    *("key_antiquant_scale", "key_antiquant_offset", "key_antiquant_mode", "block_size"),
    *("value_antiquant_scale", "value_antiquant_offset", "value_antiquant_mode", "block_table"),
    *("num_heads", "num_key_value_heads", "scale", "input_layout", "sparse_mode"),
    *("pre_tokens", "next_tokens", "softmax_lse_flag", "query_rope", "key_rope"),
)
Attended = tuple[Value, Value | None]  # and the log-sum-exp, where it is asked for


def fused_infer_attention_score(c: FunctionCall) -> Sequence[Value]:
    """(Attention like the query, the log-sum-exp or an empty float32 in its place)."""
    c.only(*KNOWN)
    if c.others.get("key_antiquant_mode", 0) or c.others.get("value_antiquant_mode", 0):
        raise c.refusal("quantized a token")
    paged = "block_table" in c.tensors
    out, lse = _decode(c) if paged else _prefill(c)
    shaped = c.b.op("Reshape", out, c.b.op("Shape", c.tensor("query")))
    lse = c.b.constant(torch.empty(0)) if lse is None else lse
    return [c.b.cast(shaped, F32, c.types["query"].dtype), lse]


def _heads(c: FunctionCall) -> tuple[int, int, int]:
    """KV heads, query heads to each, and channels of a head."""
    heads = c.number("num_heads")
    kv = int(c.others.get("num_key_value_heads", 0)) or heads  # type: ignore[call-overload]
    width = int(c.types["query"].shape[-1])
    return kv, heads // kv, width if c.others.get("input_layout") == "TND" else width // heads


def _rotated(c: FunctionCall) -> int:
    """Channels of a head that lie apart, in query_rope and key_rope; 0 where there are none."""
    if "query_rope" not in c.tensors:
        return 0
    width = int(c.types["query_rope"].shape[-1])
    return width if c.others.get("input_layout") == "TND" else width // c.number("num_heads")


def _decode(c: FunctionCall) -> Attended:
    """One query row a sequence [T, 1, heads*dim] over its pages [blocks, block_size, width]."""
    if c.others.get("input_layout", "BSH") != "BSH" or c.types["query"].shape[1] != 1:
        raise c.refusal("over pages in another layout than one query a sequence in BSH")
    if len(c.types["key"].shape) != 3:
        raise c.refusal("over pages of another form than [blocks, block_size, width]")
    b, (kv, groups, dim) = c.b, _heads(c)
    lens = b.op("Unsqueeze", c.tensor("actual_seq_lengths_kv"), [1])  # [T, 1]
    table = _pages(c, lens)
    k, v = (_side(c, name, table) for name in ("key", "value"))  # [T, L, kv, dim]
    q = b.op("Reshape", c.float32("query"), [-1, kv, groups, dim])
    if rotated := _rotated(c):
        q = b.op(
            "Concat",
            q,
            b.op("Reshape", c.float32("query_rope"), [-1, kv, groups, rotated]),
            axis=-1,
        )
        pages = b.op("Gather", c.tensor("key_rope"), table, axis=0)
        pages = b.cast(pages, c.types["key_rope"].dtype, F32)
        k = b.op("Concat", k, b.op("Reshape", pages, [0, -1, kv, rotated]), axis=-1)
    key = _range(b, b.op("Shape", k, start=1, end=2))
    hidden = b.op("Unsqueeze", b.op("GreaterOrEqual", key, lens), [1, 2])  # [T, 1, 1, L]
    if "atten_mask" in c.tensors:  # what a window does not reach
        mask = b.op("Slice", c.tensor("atten_mask"), [0], b.op("Shape", k, start=1, end=2), [3])
        hidden = b.op("Or", hidden, mask)
    keys, values = (
        b.op("Transpose", x, perm=[0, 2, *last]) for x, last in ((k, (3, 1)), (v, (1, 3)))
    )
    out, lse = _attend(c, b.op("MatMul", q, keys), values, hidden)
    return out, lse and b.op("Reshape", lse, [0, kv * groups, 1, 1])


def _pages(c: FunctionCall, lens: Value) -> Value:
    """The blocks of each sequence up to the longest's end; what lies past an end is block 0."""
    b, block = c.b, c.b.op("Shape", c.tensor("key"), start=1, end=2)
    longest = b.op("ReduceMax", b.op("Concat", b.op("Reshape", lens, [-1]), [1], axis=0), [0])
    pages = b.op("Div", b.op("Sub", b.op("Add", longest, block), [1]), block)
    table = b.cast(c.tensor("block_table"), c.types["block_table"].dtype, I64)
    table = b.op("Slice", table, [0], pages, [1])
    at = b.op("Mul", _range(b, pages), block)
    return b.op("Where", b.op("Less", at, lens), table, b.number(0, I64))


def _range(b: Builder, end: Value) -> Value:
    return b.op("Range", b.number(0, I64), b.op("Squeeze", end, [0]), b.number(1, I64))


def _side(c: FunctionCall, name: str, table: Value) -> Value:
    """Keys or values of each sequence, float32 [T, L, kv, dim]."""
    kv, _, dim = _heads(c)
    rows = c.b.op("Reshape", c.b.op("Gather", c.tensor(name), table, axis=0), [0, -1, kv, dim])
    value = c.b.cast(rows, c.types[name].dtype, F32)
    for part, kind in (("offset", "Add"), ("scale", "Mul")):
        parameter = f"{name}_antiquant_{part}"
        if parameter in c.tensors:
            if c.types[parameter].shape[-1] != kv * dim:
                raise c.refusal(f"with {parameter} of one value")
            value = c.b.op(kind, value, c.b.op("Reshape", c.float32(parameter), [kv, dim]))
    return value


def _prefill(c: FunctionCall) -> Attended:
    """Rows over themselves: [B, S, width] in BSH, or [T, heads, dim] end to end in TND."""
    layout, b, (kv, groups, dim) = c.others.get("input_layout", "BSH"), c.b, _heads(c)
    if layout not in ("BSH", "TND") or "key_antiquant_scale" in c.tensors:
        raise c.refusal("over rows in another layout than BSH or TND, or of int8")
    first = 0 if layout == "BSH" else 1
    q = b.op("Reshape", c.float32("query"), [first, -1, kv, groups, dim])
    k, v = (b.op("Reshape", c.float32(n), [first, -1, kv, dim]) for n in ("key", "value"))
    if rotated := _rotated(c):
        beside = b.op("Reshape", c.float32("query_rope"), [first, -1, kv, groups, rotated])
        q = b.op("Concat", q, beside, axis=-1)
        beside = b.op("Reshape", c.float32("key_rope"), [first, -1, kv, rotated])
        k = b.op("Concat", k, beside, axis=-1)
    rows = b.op("Transpose", q, perm=[0, 2, 3, 1, 4])
    rows = b.op("Reshape", rows, [0, 0, -1, dim + rotated])
    logits = b.op("MatMul", rows, b.op("Transpose", k, perm=[0, 2, 3, 1]))
    many = b.op("Concat", [0, kv, groups, -1], b.op("Shape", k, start=1, end=2), axis=0)
    logits = b.op("Reshape", logits, many)  # [B, kv, groups, S, L]
    values = b.op("Unsqueeze", b.op("Transpose", v, perm=[0, 2, 1, 3]), [2])
    out, lse = _attend(c, logits, values, _unseen(c, q, k))
    lse = lse and b.op("Reshape", lse, [first, kv * groups, -1, 1])
    if lse and layout == "TND":
        lse = b.op("Squeeze", b.op("Transpose", lse, perm=[0, 2, 1, 3]), [0])
    return b.op("Transpose", out, perm=[0, 3, 1, 2, 4]), lse


def _unseen(c: FunctionCall, q: Value, k: Value) -> Value | None:
    """Which keys [L] each row [S] does not see, aligned at the last row and key of its sequence."""
    b, mode, found = c.b, c.others.get("sparse_mode", 0), []
    if mode not in (0, 3, 4):
        raise c.refusal(f"in sparse_mode {mode}")
    ends = [b.op("Shape", x, start=1, end=2) for x in (q, k)]
    row, key = b.op("Unsqueeze", _range(b, ends[0]), [1]), _range(b, ends[1])
    if c.others.get("input_layout") == "TND":
        row, key, strangers = _packed(c, row, key)
        found.append(strangers)
    else:
        row, key = b.op("Sub", row, ends[0]), b.op("Sub", key, ends[1])
    apart = b.op("Sub", key, row)
    if mode:
        after = c.number("next_tokens") if mode == 4 else 0
        found.append(b.op("Greater", apart, b.number(after, I64)))
    if mode == 4:
        found.append(b.op("Less", apart, b.number(-c.number("pre_tokens"), I64)))
    while len(found) > 1:
        found = [b.op("Or", *found[:2]), *found[2:]]
    return found[0] if found else None


def _packed(c: FunctionCall, row: Value, key: Value) -> tuple[Value, Value, Value]:
    """Rows and keys counted back from the end of their sequence, and which pairs are of two.

    The ends of the sequences are cumulative. A row past the last end is of no sequence.
    """
    b = c.b
    names = ("actual_seq_lengths", "actual_seq_lengths_kv")
    sequences, places = [], []
    for at, name in ((row, names[0]), (key, names[1])):
        ends = c.tensor(name)
        past = b.op("GreaterOrEqual", b.op("Unsqueeze", at, [-1]), ends)
        sequence = b.op("ReduceSum", b.cast(past, torch.bool, I64), [-1], keepdims=0)
        count = b.op("Shape", ends)
        last = b.op("Gather", ends, b.op("Min", sequence, b.op("Sub", count, [1])))
        sequences.append(sequence)
        places.append(b.op("Sub", at, last))
    other = b.op("Not", b.op("Equal", *sequences))
    none = b.op("GreaterOrEqual", sequences[0], count)
    return places[0], places[1], b.op("Or", other, none)


def _attend(c: FunctionCall, logits: Value, values: Value, hidden: Value | None) -> Attended:
    """softmax(logits * scale) @ values, a row that sees no key giving zeros; sums [..., 1]."""
    b, scale = c.b, c.others.get("scale", 1.0)
    assert isinstance(scale, float)
    lowest = b.number(float("-inf"), F32)
    logits = b.op("Mul", logits, b.number(scale, F32))
    if hidden is not None:
        logits = b.op("Where", hidden, lowest, logits)
    largest = b.op("ReduceMax", logits, [-1], keepdims=1)
    largest = b.op("Where", b.op("Equal", largest, lowest), b.number(0, F32), largest)
    weights, lse = b.op("Exp", b.op("Sub", logits, largest)), None
    total = b.op("ReduceSum", weights, [-1], keepdims=1)
    total = b.op("Where", b.op("Equal", total, b.number(0, F32)), b.number(1, F32), total)
    if c.others.get("softmax_lse_flag"):
        lse = b.op("Add", largest, b.op("Log", total))
    dtype = c.types["query"].dtype
    weights = b.cast(b.cast(weights, F32, dtype), dtype, F32)
    return b.op("Div", b.op("MatMul", weights, values), total), lse
