"""vLLM finds the plug-in by itself, and what an artifact was not compiled for is refused."""

import shutil

import pytest
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from kvc8.ir.errors import TargetError


def test_vllm_finds_the_plug_in_and_may_load_it_twice() -> None:
    from kvc8.backends.vllm import register

    load_general_plugins()
    assert "Kvc8ForCausalLM" in ModelRegistry.get_supported_archs()
    register()


def test_an_artifact_needs_no_option(made) -> None:
    config = EngineArgs(model=str(made / "w8a8-npu")).create_engine_config()
    assert config.model_config.architectures == ["Kvc8ForCausalLM"]
    assert config.cache_config.block_size == 128


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"block_size": 64},
            "--block-size: is 64 and the artifact was compiled for 128; leave it out, or compile "
            "with --block-size 64",
        ),
        (
            {"dtype": "bfloat16"},
            "--dtype: is bf16 and the artifact computes in f16; leave it out, or compile with that "
            "dtype",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            "--kv-cache-dtype: changes what a compiled model computes; leave it out",
        ),
        (
            {"tensor_parallel_size": 2},
            "--tensor-parallel-size: is 2 and the artifact was compiled for 1; give 1, "
            "or compile with --tp 2",
        ),
        (
            {"enable_lora": True},
            "--enable-lora: changes what a compiled model computes; leave it out",
        ),
    ],
)
def test_what_the_artifact_was_not_compiled_for_is_refused(made, given, sentence) -> None:
    with pytest.raises(TargetError) as caught:
        EngineArgs(model=str(made / "w8a8-npu"), **given).create_engine_config()
    assert str(caught.value) == sentence


def test_an_artifact_without_a_phase_is_refused(made, tmp_path) -> None:
    part = tmp_path / "part"
    shutil.copytree(made / "w8a8-npu", part, copy_function=shutil.os.link)
    (part / "chunk.py").unlink()
    with pytest.raises(TargetError) as caught:
        EngineArgs(model=str(part)).create_engine_config()
    assert str(caught.value) == f"{part}/chunk.py: is not there; compile the model again"
