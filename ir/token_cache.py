"""A cache whose tokens have each a scale of its own, which lies beside it in a cache of its own."""

from operator import getitem

from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.errors import IRError
from kvc8.ir.program import argument, expression_of, is_cache, is_call, unshaped


def is_steps(node: Node) -> bool:
    """Whether a node is the cache of the scales that the tokens of another have."""
    return is_cache(node) and expression_of(node).op == "cache_steps"


def quantized_tokens(rows: Node, item: int = 0) -> Node | None:
    """The `kvc8.quantize_tokens` that rows are the codes of, or item 1, the scales; else None."""
    found = unshaped(rows)
    both = argument(found, 0) if is_call(found, getitem) and found.args[1] == item else None
    return both if is_call(both, ops.quantize_tokens) else None


def check_same_token(write: Node, reader: Node, tokens: Node) -> None:
    """Raise IRError unless what reads such codes has their scales too, of the same slots."""
    steps = argument(reader, 1) if is_call(reader, ops.dequantize_tokens) else write
    if (
        steps is write
        or not is_call(steps, ops.cache_write)
        or reader.args[2] != tokens.args[1]
        or steps.args[2] != write.args[2]
        or quantized_tokens(argument(steps, 1), 1) is not tokens
    ):
        what = f"reads {write.name} otherwise than {tokens.name} quantized it"
        raise IRError(reader.name, what, "dequantize by the scales of the same tokens")
