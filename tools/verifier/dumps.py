"""`kvc8-verify dump OUT FILE`: what a device gave, node by node, against the emulation.

Each node is computed again from the values that the device had for its arguments, so a difference
shows where it arises and nowhere after (isolated). Beside that the program runs from the inputs of
the dump on; how far a node has come apart then (accumulated, relative RMS) is told as well. One
that differs in that alone is the victim of one before it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import Node

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.backends.npu.artifact_reader import read
from kvc8.backends.npu.dumps import Difference, again, read_dump
from kvc8.backends.runtime.model import make_parameters
from kvc8.ir.errors import TargetError
from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, type_of
from kvc8.ir.run import Value, run
from kvc8.ir.types import IntsType
from kvc8.tools.verifier.gaps import gap

MOST = 20  # nodes that the table lists


def work(args: argparse.Namespace) -> int:
    """Compare and print; a difference is no error, for rounding may explain it."""
    artifact, dump = read(args.directory), read_dump(args.dump)
    found, apart = list[Difference](), dict[tuple[str, str], float]()
    made: dict[Expression, torch.Tensor] = {}
    for phase, program in artifact.programs.items():
        if any(name.startswith(f"{phase}/") for name in dump):
            parameters = make_parameters(program, artifact.make, torch.device("cpu"), made)
            found += again(phase, program, dump, parameters)
            apart |= accumulated(phase, program, dump, parameters)
    if not found:
        phases = ", ".join(artifact.programs)
        raise TargetError(
            f"{args.dump}", f"has no values of {phases}", "write it with kvc8-run --dump"
        )
    if args.json:
        told = [{**asdict(x), "accumulated": apart.get((x.phase, x.node))} for x in found]
        print(json.dumps(told, indent=1))
    else:
        _print(found, apart)
    return 0


def accumulated(
    phase: str, program: Program, dump: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[tuple[str, str], float]:
    """How far each node of a phase is from the dump when the program runs here from the inputs on.

    Relative RMS by phase and node; of a node that gives several tensors, the largest.
    """
    apart: dict[tuple[str, str], float] = {}

    def observe(node: Node, value: Value) -> None:
        for name, tensor in _tensors(f"{phase}/{node.name}", value):
            if name in dump and dump[name].shape == tensor.shape and tensor.numel():
                key = phase, node.name
                apart[key] = max(apart.get(key, 0.0), gap(dump[name], tensor).relative)

    run(program, {**parameters, **_inputs(phase, program, dump)}, observe)
    return apart


def _inputs(phase: str, program: Program, dump: Mapping[str, Tensor]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for node in (*program.inputs(), *program.caches()):
        value = dump[f"{phase}/in/{node.name}"]
        found[node.name] = value.tolist() if isinstance(type_of(node), IntsType) else value.clone()
    return found


def _tensors(name: str, value: Value) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}.{i}", item)


def _print(found: Sequence[Difference], apart: Mapping[tuple[str, str], float]) -> None:
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
        total = apart.get((each.phase, each.node))
        told = "" if total is None else f"; accumulated {total:.2g}"
        print(f"{each.phase} {each.node} ({each.origin or 'no origin'}), {each.op}: {share}{told}")
    victims = sum(bool(total) for total in apart.values()) - sum(
        bool(apart.get((each.phase, each.node))) for each in differing
    )
    if victims:
        print(f"{victims:,} nodes more differ only because their inputs do")
    if len(differing) > MOST:
        print(f"and {len(differing) - MOST:,} more")
