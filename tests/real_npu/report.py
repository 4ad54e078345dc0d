"""What torch_npu and torchair make of all programs, in counts."""

import sys
from collections import Counter
from pathlib import Path

import torch_npu
from converters import Exporter, alone, answer_for_cann, convert, has_converter
from propagate import export, is_collective, is_npu, module, plain_sizes, propagate
from torch.fx import Node

from kvc8.ir.program import Program, substitute, type_of
from kvc8.ir.shapes import Shapes
from kvc8.ir.text import parse


class Tally:
    """What has been found so far."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.accepted = 0
        self.distinct: dict[object, Node] = {}  # NPU calls whose types differ
        self.wrong: list[str] = []

    def take(self, name: str, program: Program, exporter: Exporter) -> None:
        """Ask everything about one program."""
        for node, difference in propagate(program):
            if difference:
                self.wrong.append(f"{name}: {node.name}: {difference}")
            if is_npu(node):
                self.calls[str(node.target)] += 1
                self.accepted += not difference
                self.distinct.setdefault(signature(node), node)
        if fixed := export(program):
            self.wrong.append(f"{name}: torch.export made a number of {fixed}")
        gaps = {
            str(n.target) for n in program.graph.nodes if is_npu(n) and not has_converter(n.target)
        }
        # torchair asks for the process group of a collective, of which this process has none.
        gaps |= {str(n.target) for n in program.graph.nodes if is_collective(n)}
        made = (
            "no whole graph" if gaps else f"{convert(*module(program), exporter).total():,} GE ops"
        )
        nodes = len(program.graph.nodes)
        but = ", ".join(sorted(plain_sizes(program) - {"S"}))
        sizes = f"dynamic sizes{f' but {but}' if but else ''}"
        print(f"{name}: {nodes:,} nodes, exported with {sizes}, {made}", flush=True)

    def convert_each(self, exporter: Exporter) -> None:
        """Convert each distinct call by itself, where there is a converter."""
        for node in self.distinct.values():
            if has_converter(node.target) and not convert(*alone(node), exporter):
                self.wrong.append(
                    f"{node.target}: its converter makes nothing of {signature(node)}"
                )


def signature(node: Node) -> str:
    """What two calls have in common that convert alike."""
    return f"{node.target} {substitute([*node.args, *node.kwargs.items()], type_of)}"


def report(programs: Path) -> int:
    """Print what was found; 1 where anything is not as it should be."""
    exporter, tally = answer_for_cann(), Tally()
    shapes = Shapes()  # of all programs, for they make many of the same calls
    for path in sorted(programs.glob("*.py")):
        tally.take(path.stem, parse(path.read_text(), shapes), exporter)
    tally.convert_each(exporter)
    assert "kvc8.ir.npu" not in sys.modules, "kvc8's own declarations came between"
    without = sorted(
        {str(n.target) for n in tally.distinct.values() if not has_converter(n.target)}
    )
    print("calls:", ", ".join(f"{op} {count:,}" for op, count in sorted(tally.calls.items())))
    print("ops without a converter:", ", ".join(without) or "none")
    print(
        f"torch_npu {torch_npu.__version__}: ops {len(tally.calls)}, "
        f"calls {tally.calls.total():,}, accepted {tally.accepted:,}, "
        f"with converter {len(tally.calls) - len(without)}, without {len(without)}; "
        f"{len(tally.distinct)} distinct calls"
    )
    for line in tally.wrong:
        print(f"WRONG {line}")
    return int(bool(tally.wrong) or not tally.calls)
