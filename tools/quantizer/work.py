"""Go over a model layer by layer, and remember what is done, so that a killed run can go on.

A recipe makes one or more sweeps over the layers. In each it gets one layer after the other with
its weights, runs every text through it in order, and gives what it has found out. After a layer
the texts' activations, the findings and the tensors written are brought to disk, and then a line
in `progress.json` says so: what a killed run has done after that line is done again, to the same
bytes.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.fx import Node

from kvc8.ir.checkpoint.model_files import read_json, shown
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.safetensors_files import read_header
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.errors import ModelError
from kvc8.ir.program import Program
from kvc8.tools.quantizer.activations import Activations, reopen
from kvc8.tools.quantizer.layers import Evaluate, LayerCalls, plain, run_stage, stages, weights_of
from kvc8.tools.quantizer.writer import Entry, ModelWriter, write_tensors

# Layers done, with a fraction, the one at work, and the tokens that it took since the last time.
Report = Callable[[float, str, int], None]
Texts = Sequence[Sequence[int]]


@dataclass
class Layer:
    """A layer at work: its weights, and the texts on their way through it."""

    stage: LayerCalls
    weights: dict[Node, Tensor]
    texts: Texts
    _entering: Activations
    _leaving: Activations
    _report: Callable[[float, int], None]

    def entering(self, index: int) -> dict[Node, Tensor]:
        """What the layers before pass on of a text."""
        nodes = {node.name: node for node in [*self.stage.keeps, *_used(self.stage)]}
        return {nodes[name]: t for name, t in self._entering.get(index).items() if name in nodes}

    def run(self, index: int, weights: Mapping[Node, Tensor], evaluate: Evaluate) -> None:
        """Run a text through the layer and pass on what it gives; each once, in order."""
        assert index == len(self._leaving.spans), "texts run in their order"
        kept = run_stage(self.stage, weights, self.entering(index), self.texts[index], evaluate)
        self._leaving.add({node.name: value for node, value in kept.items()})
        self._report((index + 1) / len(self.texts), len(self.texts[index]))


LayerWork = Callable[[Layer], Mapping[str, Tensor]]  # what was found out, by name


@dataclass
class Work:
    """A run: the model, where its state lies, and how far it has come."""

    checkpoint: Checkpoint
    program: Program
    directory: Path  # of the model
    state: Path
    shard: float | None  # bytes of a weights file, as near as can be
    report: Report
    stored: Callable[[Sequence[Entry]], Sequence[Entry]] = list  # as an engine wants them
    _writers: list[ModelWriter] = field(default_factory=list)
    _sweeps: int = 0
    _done: dict[str, object] = field(default_factory=dict)

    def begin(self, settings: Mapping[str, object]) -> None:
        """Go on with what lies there, or start. Raises ModelError where it has other settings."""
        path = self.state / "progress.json"
        self._done = read_json(path) if path.exists() else {}
        old = self._done.setdefault("settings", dict(settings))
        assert isinstance(old, dict)
        for name, value in settings.items():
            if old.get(name) != value:
                what = f"the unfinished run has {name} {shown(old.get(name))}"
                raise ModelError(
                    "--resume",
                    f"{what} and this one {shown(value)}",
                    "give the same options, or leave --resume out and remove its directory",
                )

    def writer(self, entries: Sequence[Entry]) -> ModelWriter:
        """Lay out the weights files, or open those that an earlier run has laid out."""
        made = ModelWriter(self.directory, self.stored(entries), self.shard)
        self._writers.append(made)
        return made

    def sweep(self, texts: Texts, work: LayerWork) -> list[Mapping[str, Tensor]]:
        """Take the texts through all layers; gives what `work` found in each."""
        found = stages(self.program)
        sweep, self._sweeps = self._sweeps, self._sweeps + 1
        at = self._progress(sweep)
        last = self._entered(sweep, at, texts)
        for index in range(max(at, 0) + 1, len(found)):
            stage = found[index]
            leaving = Activations(self._file(sweep, index))
            done = sweep * (len(found) - 1) + index - 1
            tell = partial(self._tell, done, f"layer {stage.layer}")
            layer = Layer(stage, weights_of(stage, self.checkpoint), texts, last, leaving, tell)
            self._save(sweep, index, work(layer))
            del layer
            self._commit(sweep, index, leaving)
            last.remove()
            last = leaving
        return [self._found(sweep, index) for index in range(1, len(found))]

    def _tell(self, done: int, where: str, part: float, tokens: int) -> None:
        self.report(done + part, where, tokens)

    def _progress(self, sweep: int) -> int:
        """The last stage of a sweep that is done; -1 where none is."""
        at = self._done.get("at", [0, -1])
        assert isinstance(at, list)
        if at[0] == sweep:
            return int(at[1])
        return -1 if at[0] < sweep else len(stages(self.program)) - 1

    def _entered(self, sweep: int, at: int, texts: Texts) -> Activations:
        """The activations to go on with: those before the first layer are computed here."""
        path = self._file(sweep, max(at, 0))
        index = self._done.get("spans")
        if at > 0 and self._done.get("at") == [sweep, at] and isinstance(index, list):
            return reopen(path, index)
        made = Activations(path)
        if at > 0:  # a sweep that is over
            return made
        first = stages(self.program)[0]
        weights = weights_of(first, self.checkpoint)
        for tokens in texts:
            kept = run_stage(first, weights, {}, tokens, plain(self.checkpoint, _no_attention))
            made.add({node.name: value for node, value in kept.items()})
        return made

    def _file(self, sweep: int, index: int) -> Path:
        return self.state / f"activations-{sweep}-{index}"

    def _save(self, sweep: int, index: int, found: Mapping[str, Tensor]) -> None:
        entries = [Entry(n, t.dtype, tuple(t.shape), "") for n, t in found.items()]
        write_tensors(self._results(sweep, index), entries, found.items())

    def _results(self, sweep: int, index: int) -> Path:
        return self.state / f"found-{sweep}-{index}.safetensors"

    def _found(self, sweep: int, index: int) -> Mapping[str, Tensor]:
        return {n: load(t) for n, t in read_header(self._results(sweep, index)).items()}

    def _commit(self, sweep: int, index: int, leaving: Activations) -> None:
        """Say that a layer is done, when all that it left is on disk."""
        leaving.flush()
        for writer in self._writers:
            writer.settle()
        spans = [[[s.name, s.dtype, s.shape, s.offset] for s in text] for text in leaving.spans]
        self._done |= {"at": [sweep, index], "spans": spans}
        new = self.state / "progress.json.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(self._done, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.state / "progress.json")


def _used(stage: LayerCalls) -> list[Node]:
    return [node for call in stage.calls for node in call.all_input_nodes]


def _no_attention(call: Node, *_: object) -> Tensor:
    raise AssertionError(f"{call.name} stands before the first layer")
