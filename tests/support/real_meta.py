"""What the real torch_npu's meta functions say of a call, where torch_npu loads.

names = real_meta_functions()        before anything of kvc8 declares the ops
Meta(names, log).expected(...)       of each call, to compare with what the emulation gave
"""

from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kvc8.backends.npu.device import declare_ops

ASKED, NONE = "asked", "none"  # what the log says of a call, before its op


def declared_ops() -> list[str]:
    """The names of the ops that kvc8 knows, without declaring them."""
    rows = files("kvc8.ir").joinpath("npu_schemas.txt").read_text().splitlines()
    return [row.partition("(")[0] for row in rows if not row.startswith("#")]


def real_meta_functions() -> frozenset[str] | None:
    """The ops that torch_npu has a meta function for; None where torch_npu does not load."""
    if not declare_ops():
        return None
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name for name in declared_ops() if has(name, "Meta"))


@dataclass(frozen=True)
class Meta:
    """Holds what the emulation gives to torch_npu's meta functions; processes share the log."""

    names: frozenset[str]
    log: str

    def expected(self, func: Any, args: Any, kwargs: Any) -> list[object] | None:
        """Dtypes and shapes of what a call gives; None where there is no meta function."""
        known = func._schema.name in self.names
        with Path(self.log).open("a", encoding="utf-8") as file:
            file.write(f"{ASKED if known else NONE} {func._schema.name}\n")
        if not known:
            return None
        with FakeTensorMode():
            given = tree_map_only(Tensor, _on_npu, (args, kwargs))
            return described(func(*given[0], **given[1]))

    def summary(self) -> list[str]:
        """How many calls were compared, and of which ops there was nothing to compare with."""
        said = Counter(Path(self.log).read_text("utf-8").splitlines())
        asked = {k.partition(" ")[2]: n for k, n in said.items() if k.startswith(ASKED)}
        without = sorted(set(declared_ops()) - self.names)
        missed = sum(n for k, n in said.items() if k.startswith(NONE))
        known = f"meta functions of {len(self.names)} of {len(declared_ops())} ops"
        return [
            f"the real torch_npu: {known}; "
            f"{sum(asked.values()):,} calls of {len(asked)} ops compared with them",
            f"no meta function: {', '.join(without) or 'none'} ({missed:,} calls not compared)",
        ]


def _on_npu(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="npu")


def described(value: Any) -> list[object]:
    """Dtype and shape of each tensor."""
    return [(x.dtype, tuple(x.shape)) for x in tree_leaves(value) if isinstance(x, Tensor)]
