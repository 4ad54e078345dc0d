"""What stands for torch.npu on a CPU: graphs that are recorded and replayed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvc8.backends.npu  # noqa: F401  declares the op

ATTENTION = torch.ops.npu.npu_fused_infer_attention_score.default


class Tape(TorchDispatchMode):
    """Stands for an NPUGraph: the ops that ran, which run again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, dict(kwargs or {}), out))
        return out

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        attention = [kwargs for func, _, kwargs, _ in self.calls if func is ATTENTION]
        for kwargs, lengths in zip(attention, cpu_update_input, strict=True):
            kwargs.update(lengths)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.numel():
                    old.copy_(new)


class FakeNpu:
    """Stands for `torch.npu`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def NPUGraph(self) -> Tape:
        self.tapes.append(Tape())
        return self.tapes[-1]

    @contextmanager
    def graph(self, npu_graph: Tape, *, auto_dispatch_capture: bool) -> Iterator[None]:
        assert auto_dispatch_capture  # or lengths could not be updated
        with npu_graph:
            yield

    def synchronize(self) -> None:
        """Nothing runs beside a CPU."""
