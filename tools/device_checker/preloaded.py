"""What the server of the probes' processes imports: torch_npu before kvc8's own ops, then those."""

from kvc8.backends.npu.device import declare_ops

declare_ops()

from kvc8.tools.device_checker import work as _work  # noqa: E402, F401
