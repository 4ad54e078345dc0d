"""kvc8: int8 KV caches for language models on Ascend NPUs, with every step's numbers checked.

    import kvc8

    kvc8.quantize("model", calibration="texts.jsonl", out="model-w8a8c8")
    kvc8.compile("model-w8a8c8", target="npu", out="model-npu")
    model = kvc8.load("model-npu")  # emulated on a CPU
    print(model.generate(["Why is the sky blue?"])[0].text)

Importing kvc8 imports neither torch nor transformers; each function imports what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike
    from typing import Literal

    import torch

    from kvc8.passes.options import Options
    from kvc8.tools.driver.compiling import Compiled
    from kvc8.tools.driver.loading import Loaded
    from kvc8.tools.quantizer.quantizing import Quantized
    from kvc8.tools.quantizer.settings import Settings
    from kvc8.tools.verifier.parts import FormsResult

__all__ = ["compile", "load", "quantize", "verify"]


def quantize(
    directory: str | PathLike[str],
    *,
    out: str | PathLike[str],
    calibration: str | PathLike[str],
    settings: Settings | None = None,
    resume: bool = False,
) -> Quantized:
    """Quantize a float model directory to W8A8 with scales for an int8 KV cache, in `out`.

    `calibration` is a file of texts: JSON lines, or plain text. `settings` choose the recipe and
    what is quantized (kvc8.tools.quantizer.settings.Settings). What is done of a run that is
    interrupted stays beside `out`, and one with `resume` goes on with it. The result says what was
    quantized, and in `notes` what was found of the model.

    Raises kvc8.ir.errors.ModelError where the model, the texts or the settings are refused,
    TargetError where `out` exists.
    """
    from pathlib import Path

    from kvc8.tools.quantizer.quantizing import quantize_model
    from kvc8.tools.quantizer.settings import Settings

    given, made = settings or Settings(), Path(out)
    return quantize_model(Path(directory), made, Path(calibration), given, resume=resume)


def compile(
    directory: str | PathLike[str],
    *,
    target: Literal["npu", "onnx"],
    out: str | PathLike[str],
    options: Options | None = None,
    soc: str = "ascend910b",
    block_size: int = 128,
    flavor: Literal["standard", "gqa", "lowered"] | None = None,
    dtype: torch.dtype | None = None,
    kv_calibrated: Literal["pre-rope", "post-rope"] | None = None,
) -> Compiled:
    """Compile a model directory with scales for an int8 KV cache into the directory `out`.

    `options` choose passes (kvc8.passes.options.Options); `flavor` is of ONNX; `dtype` is what the
    program computes in: config.json's if unset, and float32 for ONNX Runtime. `kv_calibrated` says
    where K was measured, if the directory's layout implies it wrongly. The result holds the
    programs, the remark of each site that a pass looked at, and the cache's bytes a token. `out`
    is written whole or not at all.

    Raises kvc8.ir.errors.ModelError where the directory cannot be read or captured, IRError where
    a pass finds nothing it needs, TargetError where the target cannot run the program or `out`
    exists. Each is a sentence `where: what is wrong; what to do`.
    """
    from pathlib import Path

    from kvc8.passes.options import Options
    from kvc8.tools.driver.compiling import compile_model
    from kvc8.tools.driver.request import Target, open_calibrated

    checkpoint = open_calibrated(Path(directory), kv_calibrated)
    name = str(dtype).removeprefix("torch.") if dtype else None
    to = Target(target, soc, block_size, flavor, name)
    return compile_model(checkpoint, Path(out), to, options or Options())


def load(
    path: str | PathLike[str], *, device: Literal["cpu", "npu"] = "cpu", threads: int = 0
) -> Loaded:
    """Open what `compile` wrote, to generate text: an NPU artifact or an ONNX model.

    With `device` "cpu" NPU ops are emulated as they are documented; "npu" needs torch_npu and CANN,
    and must come before anything else of kvc8 is imported. `threads` are of ONNX Runtime (0: one a
    core). For the steps alone, inside of another engine: kvc8.backends.npu.embed.load_steps.

    Raises TargetError where there is no such device, ModelError or IRError where the directory is
    damaged.
    """
    from pathlib import Path

    if device == "npu":
        from kvc8.backends.npu.device import load_torch_npu

        on = load_torch_npu()
    else:
        import torch

        on = torch.device("cpu")
    from kvc8.tools.driver.loading import open_compiled

    return open_compiled(Path(path), on, threads)


def verify(
    directory: str | PathLike[str],
    *compiled: str | PathLike[str],
    options: Options | None = None,
    text: str | None = None,
    tokens: int = 200,
    steps: int = 32,
    kv_calibrated: Literal["pre-rope", "post-rope"] | None = None,
) -> FormsResult:
    """Run every form of a model on one prompt, and compare them: `kvc8-verify forms`.

    The prompt is the first `tokens` tokens of `text`, or of a text that kvc8 has; `steps` decode
    steps follow. `compiled` are what `compile` made of the directory. The result has a row a form,
    and in `problems` a sentence for each promise that a form broke: none, if all is well.

    Raises ModelError or IRError where the directory cannot be read, captured or quantized.
    """
    from pathlib import Path

    from kvc8.passes.options import Options
    from kvc8.tools.driver.request import open_calibrated
    from kvc8.tools.verifier.parts import compare_forms, prompt_of

    checkpoint, made = open_calibrated(Path(directory), kv_calibrated), [*map(Path, compiled)]
    prompt = prompt_of(Path(directory), text, tokens)
    return compare_forms(checkpoint, options or Options(), prompt, steps, made)
