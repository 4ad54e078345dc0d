"""What the tests of a process ask of torch again and again, which it answers them once.

Most tests capture tiny models, and most of those are the same few: torch.export of one takes a
second, and what its calls give is inferred anew for each program. Neither depends on the weights.
The tests of tracing and of inference themselves do without (`FRESH` in conftest.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from transformers import PretrainedConfig

from kvc8.ir.capture import trace
from kvc8.ir.capture.from_export import Trace
from kvc8.ir.capture.stamp import SETTINGS
from kvc8.ir.shapes import Op, Shapes, frozen
from kvc8.ir.types import Type

Export = Callable[[torch.nn.Module, str], Trace]
Infer = Callable[[Shapes, Op, tuple[object, ...], dict[str, object]], Type]


def remembering() -> Callable[[], AbstractContextManager[None]]:
    """What traces a model and infers a type, each once; a context in which kvc8 uses that."""
    export, infer = _export_once(trace._export), _infer_once(Shapes._run)

    @contextmanager
    def once() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "_export", export)
            patch.setattr(Shapes, "_run", infer)
            yield

    return once


def _export_once(export: Export) -> Export:
    made: dict[object, Trace] = {}

    def once(model: torch.nn.Module, path: str) -> Trace:
        key = path, _described(model)
        if key not in made:
            made[key] = export(model, path)
        return made[key]

    return once


def _infer_once(infer: Infer) -> Infer:
    made: dict[object, Type] = {}

    def once(
        shapes: Shapes, target: Op, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Type:
        key = target, frozen(args), frozen(kwargs)
        if key not in made:
            made[key] = infer(shapes, target, args, kwargs)
        return made[key]

    return once


def _described(model: torch.nn.Module) -> tuple[object, ...]:
    """All that a trace depends on: of each module its code, settings and shapes, and the configs.

    Layers of a longer model keep its config, beside that of the model they were put into.
    """
    found = {id(c): c for m in model.modules() if (c := _config(m)) is not None}
    modules = ((name, type(m), _settings(m), _shapes(m)) for name, m in model.named_modules())
    return (*(c.to_json_string(use_diff=False) for c in found.values()), *modules)


def _config(module: torch.nn.Module) -> PretrainedConfig | None:
    found = getattr(module, "config", None)
    return found if isinstance(found, PretrainedConfig) else None


def _settings(module: torch.nn.Module) -> str:
    return repr(sorted((k, v) for k, v in vars(module).items() if isinstance(v, SETTINGS)))


def _shapes(module: torch.nn.Module) -> tuple[object, ...]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)
