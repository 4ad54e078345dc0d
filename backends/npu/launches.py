"""How many kernels a lowered program launches, layer by layer.

A call is one launch. Reshapes and the like move no data and are none; a slice, a split or a
transpose is counted as the one copy that makes its result dense, for what reads it takes dense
rows (in a compiled graph; eager ops may copy once a reader).
"""

import re
from collections import Counter
from operator import add, floordiv, getitem, mul, sub

import torch
from torch.fx import Node

from kvc8.ir.program import Program, op_name

ATEN = torch.ops.aten
FREE = (
    *(ATEN.reshape.default, ATEN.flatten.using_ints, ATEN.unflatten.int, ATEN.view.default),
    *(ATEN.unsqueeze.default, ATEN.squeeze.dim, ATEN.expand.default, ATEN.sym_size.int),
    ATEN.new_empty.default,  # memory, and nothing in it
    torch.ops._c10d_functional.wait_tensor.default,  # of a collective, which is the launch
    *(getitem, add, sub, mul, floordiv),
)
LAYER = re.compile(r"\blayers\.(\d+)\b")


def is_launch(node: Node) -> bool:
    """Whether a node costs a launch."""
    return node.op == "call_function" and node.target not in FREE


def launches(program: Program) -> dict[int, Counter[str]]:
    """The launches of each decoder layer, op by op; what lies outside of the layers is left out."""
    found: dict[int, Counter[str]] = {}
    for node in filter(is_launch, program.graph.nodes):
        match = LAYER.search(node.meta.get("origin", ""))
        if match:
            assert callable(node.target)
            found.setdefault(int(match[1]), Counter())[op_name(node.target)] += 1
    return found
