"""Lay int8 caches out in NZ format (ir/nz.py) instead of ND: `--kv-format nz`.

Attention over pages takes them as [N, heads, head_dim / 32, S, 32], with inner_precise 1, which the
document of npu_fused_infer_attention_score asks for. A chunk gathers pieces of 32 values out of the
planes of a block, each row's where its slot says: slot s of blocks of S has piece p at
s + (s // S)(P - 1)S + pS of P pieces. Slots and block tables stay as they are.

before:
    def lowered(
        k: i8[T, 2, 128],
        q: bf16[T, 1, 1024],
        slots: i32[T],
        kv_slots: i32[L],
        table: i32[T, M],
        kv_lens: ints[T],
        k_cache_0: i8[N, S, 2, 128] = cache(),
        v_cache_0: i8[N, S, 2, 128] = cache(),
        s: bf16[256] = stored("s"),
    ):
        write: () = npu.npu_scatter_pa_kv_cache(k, k, k_cache_0, v_cache_0, slots, cache_mode='Norm')
        k_pages: i8[N, S, 256] = aten.flatten.using_ints(k_cache_0, 2, 3)
        v_pages: i8[N, S, 256] = aten.flatten.using_ints(v_cache_0, 2, 3)
        block: int[S] = aten.sym_size.int(k_cache_0, 1)
        both: (bf16[T, 1, 1024], f32[0]) = npu.npu_fused_infer_attention_score(q, k_pages, v_pages, actual_seq_lengths_kv=kv_lens, block_table=table, key_antiquant_scale=s, value_antiquant_scale=s, num_heads=8, num_key_value_heads=2, block_size=block)
        out: bf16[T, 1, 1024] = both[0]
        flat: i8[N*S, 2, 128] = aten.flatten.using_ints(v_cache_0, 0, 1)
        rows: i8[L, 2, 128] = aten.index_select(flat, 0, kv_slots)
        return [out, rows, k_cache_0, v_cache_0]

after:
    def lowered(
        k: i8[T, 2, 128],
        q: bf16[T, 1, 1024],
        slots: i32[T],
        kv_slots: i32[L],
        table: i32[T, M],
        kv_lens: ints[T],
        k_cache_0: i8[N, 8, S, 32] = cache_nz(2),
        v_cache_0: i8[N, 8, S, 32] = cache_nz(2),
        s: bf16[256] = stored("s"),
        planes_8: i32[8] = values([0, 1, 2, 3, 4, 5, 6, 7], i32),
    ):
        write: () = npu.npu_scatter_pa_kv_cache(k, k, k_cache_0, v_cache_0, slots, cache_mode='PA_NZ')
        unflatten: i8[N, 2, 4, S, 32] = aten.unflatten.int(k_cache_0, 1, [2, 4])
        unflatten_1: i8[N, 2, 4, S, 32] = aten.unflatten.int(v_cache_0, 1, [2, 4])
        block: int[S] = aten.sym_size.int(k_cache_0, 2)
        both: (bf16[T, 1, 1024], f32[0]) = npu.npu_fused_infer_attention_score(q, unflatten, unflatten_1, actual_seq_lengths_kv=kv_lens, block_table=table, key_antiquant_scale=s, value_antiquant_scale=s, num_heads=8, num_key_value_heads=2, block_size=block, inner_precise=1)
        out: bf16[T, 1, 1024] = both[0]
        sym_size: int[S] = aten.sym_size.int(v_cache_0, 2)
        floor_divide: i32[L] = aten.floor_divide(kv_slots, sym_size)
        mul: int[7*S] = operator.mul(sym_size, 7)
        mul_1: i32[L] = aten.mul.Tensor(floor_divide, mul)
        add: i32[L] = aten.add.Tensor(mul_1, kv_slots)
        mul_2: i32[8] = aten.mul.Tensor(planes_8, sym_size)
        unsqueeze: i32[L, 1] = aten.unsqueeze(add, 1)
        add_1: i32[L, 8] = aten.add.Tensor(unsqueeze, mul_2)
        reshape: i32[8*L] = aten.reshape(add_1, [-1])
        flatten: i8[8*N*S, 32] = aten.flatten.using_ints(v_cache_0, 0, 2)
        index_select: i8[8*L, 32] = aten.index_select(flatten, 0, reshape)
        reshape_1: i8[L, 2, 128] = aten.reshape(index_select, [-1, 2, 128])
        return [out, reshape_1, k_cache_0, v_cache_0]

A site is left alone where its cache is float, its heads are no multiple of 32, or something else
reads it.
"""

from collections.abc import Iterator
from operator import mul

import torch
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import npu
from kvc8.ir.expression import Expression
from kvc8.ir.nz import PIECE, nz_type
from kvc8.ir.program import Program, Stage, argument, is_cache, is_call, tensor_type, users
from kvc8.ir.types import TensorType
from kvc8.passes.rewrite import Remark, hit, miss, rewrite

ATEN = torch.ops.aten
FLATTEN, SIZE = ATEN.flatten.using_ints, ATEN.sym_size.int
WRITES = (npu.npu_scatter_pa_kv_cache, npu.npu_scatter_pa_kv_cache_functional)
Places = dict[int, Node]  # of gathered pieces, by how many a row has


@rewrite(
    takes=Stage.LOWERED,
    gives=Stage.LOWERED,
    contract="layout",
    required="compile with --kv-format nd",
)
def lower_caches_to_nz(program: Program) -> Iterator[Remark]:
    """See the module."""
    places: Places = {}
    for write in program.calls(*WRITES):
        caches = argument(write, 2), argument(write, 3)
        why = next(filter(None, map(_why_not, caches)), "")
        if why or not is_call(write, npu.npu_scatter_pa_kv_cache):
            yield miss(write, why or "it gives a copy of its cache")
            continue
        for cache in caches:
            _lay_out(program, cache, places)
        write.kwargs = {**write.kwargs, "cache_mode": "PA_NZ"}
        yield hit(write)


def _why_not(cache: Node) -> str:
    if not is_cache(cache):
        return "it writes to what is no input of the step"
    type_ = tensor_type(cache)
    if type_.dtype is not torch.int8:
        return "its cache is float"
    if int(type_.shape[3]) % PIECE:
        return f"its heads of {type_.shape[3]} are no multiple of {PIECE}"
    others = [user.name for user in users(cache) if not _is_known(user)]
    return f"its cache is read by {others[0]}" if others else ""


def _is_known(user: Node) -> bool:
    """Whether a reader of a cache is one of those that _lay_out moves."""
    if is_call(user, npu.npu_scatter_pa_kv_cache):
        return True
    if is_call(user, SIZE):
        return bool(user.args[1] == 1)
    if not is_call(user, FLATTEN):
        return False
    op = (
        npu.npu_fused_infer_attention_score
        if user.args[1:] == (2, 3)
        else ATEN.index_select.default
    )
    return all(is_call(reader, op) for reader in user.users)


def _lay_out(program: Program, cache: Node, places: Places) -> None:
    """Give a cache its type in NZ, and every reader what it then reads."""
    nd = tensor_type(cache)
    cache.meta["type"] = nz_type(nd)
    cache.meta["expression"] = Expression("cache_nz", (int(nd.shape[2]),))
    for reader in list(users(cache)):
        if is_call(reader, SIZE):
            reader.args = (cache, 2)
        elif is_call(reader, FLATTEN) and reader.args[1:] == (2, 3):
            _read_pages(program, reader, cache, nd)
        elif is_call(reader, FLATTEN):
            for select in list(reader.users):
                _gather(program, select, cache, nd, places)


def _read_pages(program: Program, flat: Node, cache: Node, nd: TensorType) -> None:
    heads, dim = map(int, nd.shape[2:])
    pages = program.call(flat, ATEN.unflatten.int, cache, 1, [heads, dim // PIECE])
    for attention in list(flat.users):
        attention.kwargs = {**attention.kwargs, "inner_precise": 1}
    flat.replace_all_uses_with(pages)


def _gather(program: Program, select: Node, cache: Node, nd: TensorType, places: Places) -> None:
    heads, dim = map(int, nd.shape[2:])
    count = heads * dim // PIECE
    if count not in places:
        places[count] = _places(program, select, cache, count)
    flat = program.call(select, FLATTEN, cache, 0, 2)
    pieces = program.call(select, ATEN.index_select.default, flat, 0, places[count])
    rows = program.call(select, ATEN.reshape.default, pieces, [-1, heads, dim])
    select.replace_all_uses_with(rows)


def _places(program: Program, select: Node, cache: Node, count: int) -> Node:
    """Where each piece of the rows that a call gathers lies, i32[L * count]: see the module."""

    def call(op: object, *args: Argument) -> Node:
        made = program.call(select, op, *args)  # type: ignore[arg-type]
        made.meta["origin"] = ""  # of no layer: all read it
        return made

    slots, block = argument(select, 2), call(SIZE, cache, 2)
    beyond = call(
        ATEN.mul.Tensor, call(ATEN.floor_divide.default, slots, block), call(mul, block, count - 1)
    )
    first = call(ATEN.add.Tensor, beyond, slots)
    expression = Expression("values", (tuple(range(count)), torch.int32))
    planes = program.placeholder(f"planes_{count}", TensorType(torch.int32, (count,)), expression)
    offsets = call(ATEN.mul.Tensor, planes, block)
    every = call(ATEN.add.Tensor, call(ATEN.unsqueeze.default, first, 1), offsets)
    return call(ATEN.reshape.default, every, [-1])
