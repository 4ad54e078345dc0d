"""The NPU itself: the one place where torch_npu is imported."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from kvc8.ir.checkpoint.model_files import shown
from kvc8.ir.errors import TargetError

TORCH_NPU = "torch_npu"
INSTALL = "install kvc8[npu] on a machine with CANN, or give --device cpu"


def load_torch_npu(index: int = 0, cure: str = INSTALL) -> torch.device:
    """Import torch_npu and give a device of this machine, which becomes the current one.

    It must come before kvc8.ir.npu is imported: each of the two declares the NPU's ops, and only
    kvc8.ir.npu leaves alone what is declared already. Raises TargetError where torch_npu is not
    installed, does not load, or finds no device.
    """
    if find_spec(TORCH_NPU) is None:
        raise TargetError("torch_npu", "is not installed", cure)
    if "kvc8.ir.npu" in sys.modules and TORCH_NPU not in sys.modules:
        raise TargetError(
            "torch_npu", "kvc8.ir.npu was imported before it", "call load_torch_npu() first"
        )
    try:
        import_module(TORCH_NPU)
        present = torch.get_device_module("npu").device_count()
    except (ImportError, OSError, RuntimeError) as error:
        why = shown(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise TargetError("torch_npu", f"does not load ({why})", cure) from error
    if not present:
        raise TargetError("torch_npu", "finds no NPU", cure)
    if index >= present:
        what = f"finds {present} NPUs and no number {index}"
        raise TargetError("torch_npu", what, "start as many ranks as there are")
    torch.get_device_module("npu").set_device(index)
    return torch.device("npu", index)


def graph_engine() -> Any:
    """The backend of torch.compile that torchair has, which comes with torch_npu."""
    return import_module("torchair").get_npu_backend()


def declare_ops() -> bool:
    """Import torch_npu where it is installed and loads, and touch no device; whether it did."""
    if find_spec(TORCH_NPU) is None or "kvc8.ir.npu" in sys.modules:
        return False
    try:
        import_module(TORCH_NPU)
    except (ImportError, OSError, RuntimeError):
        return False  # load_torch_npu says why
    return True
