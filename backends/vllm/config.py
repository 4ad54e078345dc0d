"""What vLLM's options may be for a compiled model, checked before anything is loaded."""

from pathlib import Path
from typing import Any

from kvc8.backends.npu.artifact_reader import Facts, facts
from kvc8.backends.vllm import versions
from kvc8.ir.errors import TargetError
from kvc8.ir.types import dtype_name


class Config:
    """The hook that vLLM calls with its whole configuration, in its first process."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set the block size where none was given; raise TargetError for what cannot be."""
        check(facts(Path(vllm_config.model_config.model)), vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: all is checked with the whole configuration."""


def check(artifact: Facts, config: Any) -> None:
    """Raise TargetError for an option that the artifact was not compiled for."""
    size = versions.set_block_size(config.cache_config, artifact.block_size)
    if size != artifact.block_size:
        what = f"is {size} and the artifact was compiled for {artifact.block_size}"
        raise TargetError(
            "--block-size", what, f"leave it out, or compile with --block-size {size}"
        )
    if (dtype := dtype_name(config.model_config.dtype)) != artifact.dtype:
        what = f"is {dtype} and the artifact computes in {artifact.dtype}"
        raise TargetError("--dtype", what, "leave it out, or compile with that dtype")
    given = config.parallel_config.tensor_parallel_size
    if given != artifact.ranks:
        what = f"is {given} and the artifact was compiled for {artifact.ranks}"
        do = f"give {artifact.ranks}, or compile with --tp {given}"
        raise TargetError("--tensor-parallel-size", what, do)
    _check_absent(config)


def _check_absent(config: Any) -> None:
    given = {
        "--quantization": config.model_config.quantization is not None,
        "--kv-cache-dtype": config.cache_config.cache_dtype != "auto",
        "--pipeline-parallel-size": config.parallel_config.pipeline_parallel_size != 1,
        "--speculative-config": config.speculative_config is not None,
        "--enable-lora": config.lora_config is not None,
        "--enable-prompt-embeds": config.model_config.enable_prompt_embeds,
    }
    for option, is_given in given.items():
        if is_given:
            raise TargetError(option, "changes what a compiled model computes", "leave it out")
