"""Run a divided model with all ranks side by side, and join what each has of the caches."""

import torch
from torch import Tensor

from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.precision.widen import widen
from kvc8.ir.program import Program, tensor_type
from kvc8.ir.ranks import side_by_side
from kvc8.passes.options import Options
from kvc8.passes.shard import shard
from kvc8.tools.verifier.forms import Run, Tokens, one_program


def in_ranks(
    reference: Program, checkpoint: Checkpoint, tokens: Tokens, options: Options
) -> tuple[Run, bool]:
    """Feed the tokens to a QUANTIZED program divided among ranks, in double precision.

    Also says whether the ranks promise the codes of the whole: sums in half are rounded one by one,
    and so are tokens of which each rank quantizes its part by a scale of its own.
    """
    divided = reference.copy()
    remarks = shard(divided, ranks=options.ranks, sums=options.sums)
    run = one_program(side_by_side(widen(divided), options.ranks), checkpoint, tokens)
    scaled = any(remark.contract == "quantizing" for remark in remarks)
    return joined(run, reference), options.sums == "int32" and not scaled


def joined(run: Run, whole: Program) -> Run:
    """A run of ranks as one of the whole program; ranks that share heads count once."""
    made = Run(logits=run.logits)
    for cache in whole.caches():
        heads, dim = (int(size) for size in tensor_type(cache).shape[2:])
        parts = [name for name in run.caches if name.partition("_rank")[0] == cache.name]
        made.caches[cache.name] = _whole([run.caches[name] for name in parts], 2, heads)
        rows = zip(*(run.rows[name] for name in parts if name in run.rows), strict=True)
        if found := [_whole(list(each), 1, heads * dim) for each in rows]:
            made.rows[cache.name] = found
    return made


def _whole(parts: list[Tensor], dim: int, size: int) -> Tensor:
    copies = len(parts) * parts[0].shape[dim] // size
    return torch.cat(parts[::copies], dim)
