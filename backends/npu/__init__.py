"""The Ascend NPU: limits of its ops, emulation on a CPU, artifact and runtime.

Imports nothing, so that `device.load_torch_npu` can run before the ops are declared; import
`kvc8.backends.npu.emulation` for their CPU kernels.
"""
