"""Write the cache in place: the functional scatter gives a copy of the whole cache.

before:
    def lowered(
        k: i8[T, 2, 32],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 32] = cache(),
        v_cache_0: i8[N, S, 2, 32] = cache(),
    ):
        both: (i8[N, S, 2, 32], i8[N, S, 2, 32]) = npu.npu_scatter_pa_kv_cache_functional(k, k, k_cache_0, v_cache_0, slots, cache_mode='Norm')
        getitem: i8[N, S, 2, 32] = both[0]
        getitem_1: i8[N, S, 2, 32] = both[1]
        neg: i8[N, S, 2, 32] = aten.neg(getitem)
        return [neg, getitem, getitem_1]

after:
    def lowered(
        k: i8[T, 2, 32],
        slots: i32[T],
        k_cache_0: i8[N, S, 2, 32] = cache(),
        v_cache_0: i8[N, S, 2, 32] = cache(),
    ):
        npu_scatter_pa_kv_cache: () = npu.npu_scatter_pa_kv_cache(k, k, k_cache_0, v_cache_0, slots, cache_mode='Norm')
        neg: i8[N, S, 2, 32] = aten.neg(k_cache_0)
        return [neg, k_cache_0, v_cache_0]

Left alone where the cache as it was is read by anyone else, or is no input of the step.
"""

from collections.abc import Iterator
from operator import getitem

from kvc8.ir import npu
from kvc8.ir.program import Program, Stage, argument, is_cache, is_call
from kvc8.passes.rewrite import Remark, hit, miss, rewrite


@rewrite(takes=Stage.LOWERED, gives=Stage.LOWERED, contract="bit_exact")
def remove_cache_copies(program: Program) -> Iterator[Remark]:
    """See the module."""
    for both in program.calls(npu.npu_scatter_pa_kv_cache_functional):
        caches = argument(both, 2), argument(both, 3)
        if not all(map(is_cache, caches)):
            yield miss(both, "it writes to what is no input of the step")
            continue
        if any(set(cache.users) != {both} for cache in caches):
            yield miss(both, "the cache is read as it was before")
            continue
        write = program.call(
            both, npu.npu_scatter_pa_kv_cache, *both.args, kwargs=dict(both.kwargs)
        )
        for item in [user for user in both.users if is_call(user, getitem)]:
            item.replace_all_uses_with(caches[item.args[1]])  # type: ignore[index]
            program.graph.erase_node(item)
        program.graph.erase_node(both)
        yield hit(write)
