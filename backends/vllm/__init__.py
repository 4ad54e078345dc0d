"""What lets vLLM serve a compiled model: `vllm serve OUT`.

vLLM owns scheduling, block tables, the memory of the KV cache, sampling and the API; kvc8 owns the
compiled forward. vLLM is imported in this folder and nowhere else in kvc8 (and measured against in
a benchmark); what differs between its versions is in versions.py. docs/serving.md is the manual.
"""

from kvc8.backends.npu.artifact import ARCHITECTURE


def register() -> None:
    """Tell vLLM of the architecture that an artifact's config.json names.

    vLLM calls this, an entry point of `vllm.general_plugins`, in each of its processes.
    """
    from kvc8.backends.vllm import versions

    versions.register(ARCHITECTURE, f"{__name__}.model:CompiledModel", f"{__name__}.config:Config")
