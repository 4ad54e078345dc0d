"""A breach of a contract, cut out of its model: two program texts and the tensors they read.

    before.py             the region as it was; it reads inputs and expressions of stored tensors
    after.py              the same after the pass
    tensors.safetensors   those inputs and stored tensors, and the bound, element by element
    breach.json           the pass, its contract, where it is, and the sentence of the breach

A region reaches back from the value that differs to the nearest values that do not. Parameters keep
their expressions. Where verify refused what a pass gave there is no before.py, and after.py holds
the node that it refused. `kvc8-opt --run DIR` runs both and compares, without the model.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Graph, Node

from kvc8.ir.checkpoint.safetensors_files import TensorFiles, read_header
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import Read, stored_names
from kvc8.ir.program import Program, expression_of, is_cache, is_parameter
from kvc8.ir.run import Value
from kvc8.ir.text import parse, show
from kvc8.ir.types import IntsType
from kvc8.tools.quantizer.writer import Entry, write_tensors
from kvc8.tools.verifier.comparison import judge
from kvc8.tools.verifier.contracts import Checked
from kvc8.tools.verifier.recording import Parameters, Recording, record
from kvc8.tools.verifier.verdicts import ComparedValue

BOUND, WRITTEN = "kvc8.bound", "kvc8.written"
TENSORS, BREACH = "tensors.safetensors", "breach.json"


@dataclass(frozen=True)
class Region:
    """A part of a program: its last node, and where it was cut."""

    program: Program
    values: dict[str, Value]  # of what it reads, by name, but for parameters


@dataclass
class Bisection:
    """Watches passes being checked; writes the first breach to `folder`, where there is one."""

    folder: Path | None
    read: Read
    found: str = ""  # the breach that was written

    def see(self, checked: Checked) -> None:
        """Look at one pass."""
        if self.folder is None or self.found or not checked.verdict.sentence:
            return
        self.found = checked.verdict.sentence
        write(checked, next(iter(checked.verdict.breaches), None), self.read, self.folder)


def write(checked: Checked, site: ComparedValue | None, read: Read, folder: Path) -> None:
    """Write the repro of a breach; without a site, of what verify refused."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"pass": checked.verdict.name, "contract": checked.verdict.contract}
    about["sentence"] = checked.verdict.sentence
    (folder / BREACH).write_text(json.dumps(about, indent=1) + "\n")
    if site is None:
        node = _named(checked.after, checked.verdict.node)
        (folder / "after.py").write_text(_text(_alone(checked.after, node), about["sentence"]))
        return
    new, old = _named(checked.after, site.node), _named(checked.before, site.old)
    comparison = checked.comparisons[site.call]
    cuts = set(comparison.stands_for) - {new}
    olds = {was for cut in cuts for was in comparison.stands_for[cut]} - {old}
    before = _region(checked.before, old, olds, comparison.old)
    after = _region(checked.after, new, cuts, comparison.new)
    (folder / "before.py").write_text(_text(before.program, about["sentence"]))
    (folder / "after.py").write_text(_text(after.program, about["sentence"]))
    names = {
        n
        for r in (before, after)
        for p in r.program.parameters()
        for n in stored_names(expression_of(p))
    }
    tensors = {name: read(name) for name in sorted(names)}
    for name, value in sorted({**after.values, **before.values}.items()):
        tensors[name] = value if isinstance(value, Tensor) else torch.tensor(value)
    tensors[BOUND], tensors[WRITTEN] = comparison.bound_of(new, old), comparison.feed.written
    entries = [Entry(name, t.dtype, tuple(t.shape), "FLOAT") for name, t in tensors.items()]
    write_tensors(folder / TENSORS, entries, tensors.items())


def _named(program: Program, name: str) -> Node:
    found: list[Node] = [node for node in program.graph.nodes if node.name == name]
    return found[0]


def _text(program: Program, sentence: str) -> str:
    return f"# {sentence}\n{show(program)}\n"


def _region(program: Program, last: Node, cuts: set[Node], recording: Recording) -> Region:
    """What gives `last`, back to the cuts. Cuts and inputs become inputs of the region."""
    wanted = _wanted(last, cuts, recording)
    made, values = Program(Graph(), program.stage), dict[str, Value]()
    ordered = [node for node in program.graph.nodes if node in wanted]
    copies = _inputs(made, [n for n in ordered if n in cuts or n.op == "placeholder"], program)
    for node, copy in copies.items():
        if not is_parameter(node) or node in cuts:
            values[copy.name] = recording.values[node]
    for node in ordered:
        if node not in copies:
            copies[node] = made.graph.node_copy(node, copies.__getitem__)
    made.graph.output([copies[last], *(copies[c] for c in program.caches() if c in copies)])
    return Region(made, values)


def _wanted(last: Node, cuts: set[Node], recording: Recording) -> set[Node]:
    wanted, waiting = {last}, [last]
    if last.op == "placeholder":  # a cache that is written in place: by whom
        waiting = [user for user in last.users if recording.values.get(user, 0) is None]
        wanted |= set(waiting)
    while waiting:
        node = waiting.pop()
        for source in node.all_input_nodes if node not in cuts else ():
            if source not in wanted:
                wanted.add(source)
                waiting.append(source)
    return wanted


def _inputs(made: Program, nodes: Iterable[Node], program: Program) -> dict[Node, Node]:
    """Placeholders of the region: inputs first, then parameters, then caches."""
    copies, last = (
        {},
        {id(c): 2 for c in program.caches()} | {id(p): 1 for p in program.parameters()},
    )
    for node in sorted(nodes, key=lambda n: last.get(id(n), 0)):
        expression = expression_of(node) if is_parameter(node) or is_cache(node) else None
        copies[node] = made.placeholder(node.name, node.meta["type"], expression)
    return copies


def _alone(program: Program, node: Node) -> Program:
    """One call, of inputs."""
    made = Program(Graph(), program.stage)
    copies = {n: made.placeholder(n.name, n.meta["type"]) for n in node.all_input_nodes}
    made.graph.output([made.graph.node_copy(node, copies.__getitem__)])
    return made


def run(folder: Path) -> str:
    """Run a repro; gives what is wrong, or nothing."""
    about = json.loads(_read(folder / BREACH))
    after = parse(_read(folder / "after.py"))
    if not (folder / "before.py").exists():
        return ""  # parse checks each type, and has refused nothing
    before = parse(_read(folder / "before.py"))
    stored, files = read_header(folder / TENSORS), TensorFiles()
    tensors = {name: files.read(tensor) for name, tensor in stored.items()}
    parameters = Parameters(tensors.__getitem__)
    recordings = [_record(program, parameters, tensors) for program in (before, after)]
    old, new = (recording.values[recording.results[0]] for recording in recordings)
    exact = [recording.twin(recording.results[0]) for recording in recordings]
    pairs = [_counted(x, tensors) for x in (old, new, *exact)]
    figure, bound = judge(about["contract"], pairs[0], pairs[1], pairs[2], pairs[3], tensors[BOUND])
    if figure <= bound:
        return ""
    names = [recording.results[0].name for recording in recordings]
    what = f"{names[1]} differs from {names[0]} by {figure:.3g}, bound {bound:.3g}"
    return f"{about['pass']}: breaks its contract {about['contract']}: {what}"


def _record(program: Program, parameters: Parameters, tensors: dict[str, Tensor]) -> Recording:
    inputs: dict[str, Value] = {}
    for node in program.inputs():
        value = tensors[node.name]
        inputs[node.name] = value.tolist() if isinstance(node.meta["type"], IntsType) else value
    caches = {cache.name: tensors[cache.name] for cache in program.caches()}
    state = {n: (c, c.double() if c.is_floating_point() else c) for n, c in caches.items()}
    return record(program, parameters, inputs, state)


def _counted(value: Value, tensors: dict[str, Tensor]) -> Tensor:
    """Of pages, the slots that were written, as many as the bound has."""
    assert isinstance(value, Tensor)
    pages = value.dim() == 4 and value.shape[0] * value.shape[1] > int(tensors[WRITTEN].max())
    bound = tensors[BOUND]
    if pages and bound.shape != value.shape:
        return value.flatten(0, 1)[tensors[WRITTEN]]
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            str(path), f"cannot be read ({error})", "name a repro's directory"
        ) from error
