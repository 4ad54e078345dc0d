"""`kvc8-verify OUT --dump FILE`: what a device gave, node by node, against the emulation.

Each node is computed again from the values that the device had for its arguments, so a difference
shows where it arises and nowhere after.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.npu.dumps import Difference, again, read_dump
from kvc8.backends.npu.runtime import make_parameters
from kvc8.ir.errors import TargetError
from kvc8.ir.recipe import Recipe

MOST = 20  # nodes that the table lists


def work(args: argparse.Namespace) -> int:
    """Compare and print; a difference is no error, for rounding may explain it."""
    artifact, dump = read(args.directory), read_dump(args.dump)
    found: list[Difference] = []
    made: dict[Recipe, torch.Tensor] = {}
    for phase, program in artifact.programs.items():
        if any(name.startswith(f"{phase}/") for name in dump):
            parameters = make_parameters(program, artifact.make, torch.device("cpu"), made)
            found += again(phase, program, dump, parameters)
    if not found:
        phases = ", ".join(artifact.programs)
        raise TargetError(f"{args.dump}: has no values of {phases}; write it with kvc8-run --dump")
    if args.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        _print(found)
    return 0


def _print(found: Sequence[Difference]) -> None:
    ops = Table(title="each node from the dump's own arguments, emulated", title_justify="left")
    for name in ("op", "results", "that differ", "values", "that differ", "by at most"):
        ops.add_column(name, justify="left" if name == "op" else "right")
    for op in dict.fromkeys(each.op for each in found):
        of = [each for each in found if each.op == op]
        wrong = [each for each in of if each.differ]
        values, differ = sum(x.values for x in of), sum(x.differ for x in of)
        most = f"{max(x.most for x in of):.3g}"
        ops.add_row(op, f"{len(of):,}", f"{len(wrong):,}", f"{values:,}", f"{differ:,}", most)
    Console(width=100).print(ops)
    differing = [each for each in found if each.differ]
    for each in differing[:MOST]:
        share = f"{each.differ:,} of {each.values:,} values, by at most {each.most:.3g}"
        print(f"{each.phase} {each.node} ({each.origin or 'no origin'}), {each.op}: {share}")
    if len(differing) > MOST:
        print(f"and {len(differing) - MOST:,} more")
