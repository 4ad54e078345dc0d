"""The machine that a user has: torch_npu and CANN. Not tried, as nothing here is, on a device."""

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kvc8.backends.npu.device import graph_engine, load_torch_npu
from kvc8.ir.errors import TargetError
from kvc8.tools.device_checker.machine import Machine

DRIVER = Path("/usr/local/Ascend/driver/version.info")


def open_npu(name: str, rank: int = 0) -> Machine:
    """The device "npu:INDEX", or of several processes the rank's: those after it, round and round.

    Raises TargetError where torch_npu does not load or has no device.
    """
    _, _, number = name.partition(":")
    if not (number or "0").isdecimal():
        raise TargetError("--device", f"{name} is no device", "name npu:0 or another number")
    device = load_torch_npu(int(number or 0))
    module = torch.get_device_module("npu")
    if rank:
        device = torch.device("npu", (int(number or 0) + rank) % module.device_count())
        module.set_device(device)
    return Machine(
        device, _facts(module.get_device_name(device)), _schema, module.synchronize,
        graphs=module, engine=graph_engine, cards=module.device_count(),
    )  # fmt: skip


def _facts(soc: str) -> dict[str, str]:
    """What is installed; no path and no name of a host."""
    found = {"SoC": soc, "torch": torch.__version__, "CANN": "unknown", "driver": "unknown"}
    with suppress(PackageNotFoundError):
        found["torch_npu"] = version("torch_npu")
    if home := os.environ.get("ASCEND_TOOLKIT_HOME"):
        for file in sorted(Path(home).rglob("ascend_toolkit_install.info")):
            found["CANN"] = _version(file) or found["CANN"]
    found["driver"] = _version(DRIVER) or found["driver"]
    found["HCCL"] = "yes" if "hccl" in torch.distributed.Backend.backend_list else "no"
    return found


def _version(file: Path) -> str:
    """The line `version=...` of one of CANN's files."""
    with suppress(OSError, UnicodeDecodeError):
        for line in file.read_text("utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip().lower() == "version":
                return value.strip()
    return ""


def _schema(name: str) -> str | None:
    """The schema of an op that has a kernel for the device."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
        return None
    namespace, _, op = name.partition("::")
    return str(getattr(getattr(torch.ops, namespace), op).default._schema)
