"""The Ascend NPU: limits of its ops, emulation on a CPU, cost, artifact and runtime.

Where torch_npu is not installed, importing this makes its ops callable on a CPU, emulated:
`torch.ops.npu.*` and `torch.ops.atb.*` with torch_npu's own schemas. Where it is installed nothing
is declared here, for torch_npu must be the first to declare its ops: call `device.load_torch_npu`,
or import `kvc8.backends.npu.emulation` to emulate them all the same.
"""

from importlib.util import find_spec

if find_spec("torch_npu") is None:
    import kvc8.backends.npu.emulation  # noqa: F401  its kernels register themselves
