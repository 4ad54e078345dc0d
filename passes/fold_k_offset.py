"""Drop the offset of K: it adds the same to every logit of a query, and softmax does not see it.

q·((k8 + o)*s) = q·(k8*s) + q·(o*s), and the second term is the same for all keys of one query,
whatever window it has. The result needs no offset for K, so it may use ops that take none.

before:
    def lowering(
        q: f16[T, 4, 32],
        k_new_0: i8[N, S, 2, 32],
        v: f16[N, S, 2, 32],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        ds: f32[64] = stored("s"),
        do: f32[64] = neg(stored("z")),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(k_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=do, dst_dtype=5)
        k: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(q, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        return [attention_0]

after:
    def lowering(
        q: f16[T, 4, 32],
        k_new_0: i8[N, S, 2, 32],
        v: f16[N, S, 2, 32],
        block_table: i32[B, M],
        seq_lens: i32[B],
        query_starts: i32[B + 1],
        ds: f32[64] = stored("s"),
    ):
        flatten: i8[N, S, 64] = aten.flatten.using_ints(k_new_0, 2, 3)
        wide: f16[N, S, 64] = npu.npu_anti_quant(flatten, ds, offset=None, dst_dtype=5)
        k: f16[N, S, 2, 32] = aten.unflatten.int(wide, 2, [2, 32])
        attention_0: f16[T, 4, 32] = kvc8.paged_attention(q, k, v, block_table, seq_lens, query_starts, 0.5, 0, 0.0, None)
        return [attention_0]

Left alone where something else reads the dequantized keys; where the logits go through a soft cap,
which the constant would move; and where a sink, a logit that has no key, stands beside them.

Bound: real_exact. In floating point a logit no longer holds q·(o*s), so it rounds at a smaller
size: each side is within (D + 3) units of the sum of the sizes of its own products.
"""

from collections.abc import Iterator

from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.program import Program, Stage, argument, is_call
from kvc8.passes.matchers.attention import dequantizer
from kvc8.passes.rewrite import Remark, hit, miss, rewrite


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="real_exact")
def fold_k_offset(program: Program) -> Iterator[Remark]:
    """See the module."""
    for attention in program.calls(ops.paged_attention):
        k = argument(attention, 1)
        back = dequantizer(k)
        if back is None or back.kwargs["offset"] is None:
            yield miss(attention, "its K has no offset")
            continue
        if why := _why_not(k, back):
            yield miss(attention, why)
            continue
        back.kwargs = {**back.kwargs, "offset": None}
        yield hit(attention)


def _why_not(k: Node, back: Node) -> str:
    if set(back.users) != {k}:
        return "its dequantized K is read elsewhere"
    for reader in k.users:
        if not is_call(reader, ops.paged_attention) or k in (reader.args[0], reader.args[2]):
            return "its K is read by more than attention"
        softcap, sinks = reader.args[8:10]
        if softcap:
            return "a soft cap lies between its logits and the softmax"
        if sinks is not None:
            return "a sink beside its logits carries no offset"
    return ""
