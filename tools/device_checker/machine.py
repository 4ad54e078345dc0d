"""What runs NPU ops: a device of the real torch_npu, or in tests what stands for one."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from kvc8.tools.device_checker.calls import SpelledCall, placed

CPU = torch.device("cpu")
# Makes of a graph and its inputs what is called in its place, as a backend of torch.compile does.
Engine = Callable[[GraphModule, list[Any]], Callable[..., Any]]
# Caches that an op writes although its schema does not say so (ir/npu.py).
WRITES = {
    "npu_rope_quant_kvcache": ("k_cache", "v_cache"),
    "npu_dequant_rope_quant_kvcache": ("k_cache", "v_cache"),
}


@dataclass(frozen=True)
class Machine:
    """A device, and what surrounds a call to it."""

    device: torch.device
    facts: Mapping[str, str]  # what is installed, by name
    schema: Callable[[str], str | None]  # of an op that it has a kernel for
    synchronize: Callable[[], None]
    running: Callable[[], AbstractContextManager[object]] = nullcontext
    graphs: Any = None  # torch.npu, or what records graphs in its place; None: not to be tried
    engine: Callable[[], Engine] | None = None  # torchair's, or what stands for it
    small: bool = False  # a stand-in: sizes that a CPU computes in a moment
    cards: int = 1
    collectives: str = "hccl"  # the backend of torch.distributed
    notes: tuple[str, ...] = field(default=())

    def run(self, call: SpelledCall, values: Mapping[str, Any]) -> list[Tensor]:
        """What the op gives and what it wrote to, on the CPU."""
        given = tree_map_only(Tensor, lambda x: x.to(self.device, copy=True), dict(values))
        with self.running(), torch.no_grad():
            found = results(call, given)
            self.synchronize()
        return [x.cpu() for x in found]


def emulated(call: SpelledCall, values: Mapping[str, Any]) -> list[Tensor]:
    """The same, as kvc8 computes it. Raises TargetError for what is not emulated."""
    given = tree_map_only(Tensor, lambda x: x.clone(), dict(values))
    with torch.no_grad():
        return results(call, given)


def results(call: SpelledCall, given: Mapping[str, Any]) -> list[Tensor]:
    """Run the op; gives the tensors that it gave, then those that it writes to."""
    args, kwargs = placed(call, given)
    returned = call.overload(*args, **kwargs)
    items = returned if isinstance(returned, tuple | list) else [returned]
    arguments = call.overload._schema.arguments
    writes = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    written = [given[name] for name in (*writes, *WRITES.get(call.op, ())) if name in given]
    return [x for x in (*items, *written) if isinstance(x, Tensor) and x.numel()]
