"""A plug-in of vLLM that the checks use: the QUANTIZED program, in float64, as a model.

What vLLM schedules, in whatever chunks and order, must not change what a model says. In floating
point it does, by rounding; in float64 a token would have to be as likely as another to one part in
10^12 to be chosen differently. So tokens are compared with this model, through the same
kvc8.backends.vllm as compiled ones: the program of all phases is one, and gives new caches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from kvc8.backends.npu.embed import Step
from kvc8.backends.runtime.head import body, head
from kvc8.backends.runtime.kv_layout import KVLayout, kv_layout
from kvc8.backends.runtime.model import make_parameters
from kvc8.backends.vllm import versions
from kvc8.backends.vllm.model import CompiledModel
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.run import Value, run
from kvc8.ir.text import parse

ARCHITECTURE = "Kvc8ExactForCausalLM"
BLOCK = 16


def register() -> None:
    """Tell vLLM of the model."""
    versions.register(ARCHITECTURE, "kvc8_checks:ExactModel", "kvc8_checks:Config")


class Config(VerifyAndUpdateConfig):
    """The hook that vLLM calls with its configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        versions.set_block_size(vllm_config.cache_config, BLOCK)


@dataclass(frozen=True)
class CopyingStep(Step):
    """A step of a program that gives new caches: these are copied into those given."""

    def __call__(self, inputs: Mapping[str, Value], caches: Sequence[Tensor]) -> Tensor:
        names = [node.name for node in self.program.caches()]
        by_name = dict(zip(names, caches, strict=True))
        result, *written = run(self.program, {**self.parameters, **by_name, **inputs})
        for cache, new in zip(caches, written, strict=True):
            cache.copy_(new)
        return result


class ExactModel(CompiledModel):
    """A directory that compile.py wrote: program.py, and the checkpoint that it reads."""

    @staticmethod
    def load(
        path: Path, device: torch.device, rank: int
    ) -> tuple[Mapping[str, Step], KVLayout, int]:
        program = parse((path / "program.py").read_text())
        read = partial(make, read=open_checkpoint(path / "checkpoint").read)
        made = {}
        first, last = body(program), head(program)
        step = CopyingStep(first, make_parameters(first, read, device, made))
        rest = CopyingStep(last, make_parameters(last, read, device, made))
        steps = {**dict.fromkeys(("prefill", "chunk", "decode"), step), "head": rest}
        return steps, kv_layout(program), BLOCK
