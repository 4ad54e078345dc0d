"""The Ascend NPU: ops as torch_npu declares them, emulation, artifact and runtime."""

from kvc8.backends.npu import emulation as emulation
