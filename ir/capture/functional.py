"""A traced model without writes to tensors that others are parts of.

Where transformers' code writes in place, torch.export records it so. A write to a whole tensor that
nothing else looks into becomes its functional op by itself (ir/capture/canonical.py). A write to a
part of a tensor (DeepSeek V3 and MiniCPM3 copy K's halves into one), or to a tensor of which a part
was taken, changes what other names stand for. torch.export's own functionalization follows that; it
traces once more, so it is done only where it is needed.
"""

import warnings

from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same model without such writes; itself where it has none."""
    if not any(_writes_to_a_part(node) for node in exported.graph.nodes):
        return exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's code about torch's code
        made: ExportedProgram = exported.run_decompositions({})
    made.graph.eliminate_dead_code()  # a size is left over in one of two layers that are alike
    return made


def _writes_to_a_part(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or not node.target._schema.name.endswith("_"):
        return False
    written = node.all_input_nodes[0]
    return _is_view(written) or any(_is_view(user) for user in written.users)


def _is_view(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.is_view
