"""Stands for an NPU on a CPU: emulated kernels that refuse what the limits forbid, and faults.

A fault is planted in one op and one way; what it changes is what a device might really do.
"""

import ast
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from support.fake_npu import FakeNpu
from support.real_meta import Meta, described
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvc8.backends.npu.facts import facts
from kvc8.backends.npu.legality import breaks, limits
from kvc8.ir.npu import SCHEMAS
from kvc8.ir.program import op_name
from kvc8.ir.types import dtype_name
from kvc8.tools.device_checker.calls import SpelledCall, call_of, program_of
from kvc8.tools.device_checker.machine import Machine

SOC = "ascend910b"
CARDS = 2  # as processes, which speak by gloo
Kernel = Callable[..., Any]


class Running(TorchDispatchMode):
    """What is called inside runs on the stand-in."""

    def __init__(
        self, faults: Mapping[str, Kernel], missing: set[str], meta: Meta | None = None
    ) -> None:
        super().__init__()
        self.faults, self.missing, self.meta = faults, missing, meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("npu", "atb"):
            return func(*args, **kwargs)
        op = op_name(func)
        if op in self.missing:
            raise NotImplementedError(f"{op} has no kernel for this device")
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if breaks_a_row(op, tuple((name, repr(_spelled(name, x))) for name, x in given.items())):
            raise RuntimeError("call aclnn failed, error code is 161002")
        wanted = self.meta.expected(func, args, kwargs) if self.meta else None
        fault = self.faults.get(op)
        found = fault(func, *args, **kwargs) if fault else func(*args, **kwargs)
        if wanted is not None and wanted != described(found):
            what = f"gives {described(found)}, and torch_npu's meta function {wanted}"
            raise RuntimeError(f"{op} {what}")
        return found


@functools.cache
def breaks_a_row(op: str, given: tuple[tuple[str, str], ...]) -> bool:
    """Whether the device refuses such a call, with a code of CANN's."""
    spelled = {name: ast.literal_eval(value) for name, value in given}
    made = SpelledCall(op, {name: x for name, x in spelled.items() if x is not None})
    return any(breaks(op, limits(SOC)[op], facts(call_of(program_of(made)), made.block_size)))


def _spelled(name: str, value: Any) -> Any:
    """An argument as text, tensors by their type."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        value = value[0]
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    if isinstance(value, list) and name.startswith("actual_seq"):
        return f"ints[{len(value)}]"
    return None if isinstance(value, torch.dtype) else value


def multiplies(func: Any, x: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor, *rest: Any,
               **more: Any) -> Any:  # fmt: skip
    return func(x, gamma, beta, (1 / scale.float()).to(scale.dtype), *rest, **more)


def refuses_80_heads(func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("num_heads") == 80:
        raise RuntimeError("aclnnFusedInferAttentionScoreV3 failed, EZ1001: heads")
    return func(*args, **kwargs)


def hangs(*_: Any, **__: Any) -> None:
    time.sleep(3600)


def crashes(*_: Any, **__: Any) -> None:
    os.abort()


def saturates_at_126(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs).clamp(max=126)


def nz_as_nd(func: Any, key: Tensor, value: Tensor, k: Tensor, v: Tensor, *rest: Any,
             **more: Any) -> Any:  # fmt: skip
    if more.get("cache_mode", "PA_NZ") != "PA_NZ":
        return func(key, value, k, v, *rest, **more)
    shape = k.shape[0], k.shape[2], *key.shape[1:]
    return func(key, value, k.view(shape), v.view(shape), *rest, **{**more, "cache_mode": "Norm"})


def cuts_to_10_bits(func: Any, x1: Tensor, x2: Tensor, scale: Tensor, *rest: Any,
                    **more: Any) -> Any:  # fmt: skip
    cut = scale & ~0x3FFFFF if scale.dtype is torch.int64 else scale
    return func(x1, x2, cut, *rest, **more)


# By name: the op, what it does, the op that is missing.
FAULTS: Mapping[str, tuple[str, Kernel | None]] = MappingProxyType(
    {
        "multiplies": ("npu_rms_norm_quant", multiplies),
        "refuses a head": ("npu_fused_infer_attention_score", refuses_80_heads),
        "hangs": ("npu_swiglu_quant", hangs),
        "crashes": ("npu_trans_quant_param", crashes),
        "saturates at 126": ("npu_quantize", saturates_at_126),
        "NZ as ND": ("npu_scatter_pa_kv_cache", nz_as_nd),
        "10 bits": ("npu_quant_matmul", cuts_to_10_bits),
        "missing": ("npu_moe_gating_top_k", None),
    }
)


def open_stand_in(
    planted: tuple[str, ...] = (), meta: Meta | None = None, rank: int = 0
) -> Machine:
    """The machine, with the faults of those names; held to meta functions where they are given."""
    faults = {op: kernel for op, kernel in (FAULTS[name] for name in planted) if kernel}
    missing = {op for op, kernel in (FAULTS[name] for name in planted) if kernel is None}
    schemas = {schema.partition("(")[0]: schema for schema in SCHEMAS}

    @contextmanager
    def running() -> Iterator[None]:
        with Running(faults, missing, meta):
            yield

    return Machine(
        torch.device("cpu"),
        {"SoC": "stand-in", "torch": torch.__version__},
        lambda name: None if name.partition("::")[2] in missing else schemas[name],
        lambda: None,
        running,
        graphs=FakeNpu(),
        engine=lambda: lambda graph, _: graph,
        small=True,
        cards=CARDS,
        collectives="gloo",
    )
