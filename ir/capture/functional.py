"""A traced model without writes to tensors that others are parts of.

Where transformers' code writes in place, torch.export records it so. A write to a whole tensor that
nothing else looks into becomes its functional op by itself (ir/capture/canonical.py). A write to a
part of a tensor, or to a tensor of which a part was taken, changes what other names stand for:

    new_empty, and copy_ to a slice of it  ->  slice_scatter, which all read that come after it
    any other                              ->  what torch.export's own functionalization makes of it

DeepSeek V3 and MiniCPM3 copy K's halves into a new tensor. torch's own traces the model twice more.
"""

import warnings

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from kvc8.ir.capture.joined import NEW
from kvc8.ir.program import is_call

ATEN = torch.ops.aten


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same model without such writes; itself where it has none, or none but to new tensors."""
    for node in exported.graph.find_nodes(op="call_function", target=ATEN.copy_.default):
        _scatter(node)
    if not any(_writes_to_a_part(node) for node in exported.graph.nodes):
        return exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's code about torch's code
        made: ExportedProgram = exported.run_decompositions({})
    made.graph.eliminate_dead_code()  # a size is left over in one of two layers that are alike
    return made


def _scatter(write: Node) -> None:
    """Put slice_scatter in place of a write to a slice of a new tensor.

    Nothing but that slice was taken of it before, and nothing reads the slice: so the others, which
    come after the write, are all that is to see it.
    """
    part, source = write.args[:2]
    if not isinstance(part, Node) or not is_call(part, ATEN.slice.Tensor) or write.users:
        return
    whole = part.args[0]
    assert isinstance(whole, Node)
    later = [user for user in whole.users if user is not part]
    if list(part.users) != [write] or any(user < write for user in later):
        return
    if not is_call(whole, *NEW, ATEN.slice_scatter.default):
        return
    graph = write.graph
    with graph.inserting_before(write):
        copy = graph.call_function(ATEN.copy.default, (part, source))
        made = graph.call_function(ATEN.slice_scatter.default, (whole, copy, *part.args[1:]))
    copy.meta, made.meta = dict(write.meta), {**write.meta, "val": whole.meta["val"]}
    for user in later:
        user.replace_input_with(whole, made)
    graph.erase_node(write)


def _writes_to_a_part(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or not node.target._schema.name.endswith("_"):
        return False
    written = node.all_input_nodes[0]
    return _is_view(written) or any(_is_view(user) for user in written.users)


def _is_view(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.is_view
