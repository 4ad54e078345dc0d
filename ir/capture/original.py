"""transformers' own model of a directory, in double precision: what a capture must compute.

transformers loads it, from the stored tensors by their names, and attends eagerly. With a captured
program it shares neither attention, nor masks, nor the way weights find their places. A linear in
W8A8 is loaded as the float linear that it stands for.

Every float is float64, also where a model's code names float32: rounding has no say then, and what
differs from it differs by meaning. Of the weights only those of the layer that runs are held; else
a parameter has a shape and a dtype and no data. What is stored is read again for each run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvc8.ir.capture.build import layers_path, model_config
from kvc8.ir.capture.foreign import FOREIGN, first_line, quiet
from kvc8.ir.capture.parameters import linear_expression
from kvc8.ir.checkpoint.reader import Checkpoint
from kvc8.ir.checkpoint.safetensors_files import StoredTensor
from kvc8.ir.checkpoint.unmapped import load
from kvc8.ir.errors import ModelError
from kvc8.ir.precision.doubled import F64, doubled, in_blocks, rows_of
from kvc8.ir.precision.twins import make_exact


@dataclass
class ModuleValues:
    """What modules took and gave, by name: the first argument, and the tensors of the result."""

    took: dict[str, Tensor] = field(default_factory=dict)
    gave: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """A model of transformers that holds no weights while it does not run."""

    model: nn.Module
    layers: str  # where the list of them stands, "model.layers"

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(list(self.model.get_submodule(self.layers).children()))

    def run(
        self, tokens: Sequence[int], watched: Callable[[str], bool] = lambda name: False
    ) -> tuple[Tensor, ModuleValues]:
        """The logits of every token, float64 [T, vocabulary], and what `watched` modules did."""
        seen, name = ModuleValues(), type(self.model).__name__
        try:
            with _watching(self.model, watched, seen), quiet(), doubled():
                found = self.model(input_ids=torch.tensor([tokens]), use_cache=False)
        except FOREIGN as error:
            what = f"transformers' own {name} cannot be run ({first_line(error)})"
            raise ModelError("config.json", what, "correct it") from error
        logits: Tensor = found.logits[0]
        return logits, seen


def open_original(checkpoint: Checkpoint, dtype: torch.dtype) -> Original:
    """Load a directory as transformers does for a model that is to compute in `dtype`.

    Raises ModelError where transformers knows no such model, or misses a weight.
    """
    config, stored = model_config(checkpoint), _floats(checkpoint)
    model = _loaded(checkpoint, config, {**stored, **_linears(checkpoint)})
    _make_constants(model, config, dtype)
    path = layers_path(model, config)
    by_place = {t.data_ptr(): checkpoint.tensors[name] for name, t in stored.items()}
    _let_go(model, path, by_place)
    _add_norm_biases(checkpoint, model)
    return Original(model.double(), path)


def copied_bytes(checkpoint: Checkpoint) -> int:
    """How much memory loading takes, at least: nothing where tensors stay where they are stored."""
    with torch.device("meta"), quiet():
        config = model_config(checkpoint)
        names = set(AutoModelForCausalLM.from_config(config).state_dict())
    dtype, every = _dtype(checkpoint), checkpoint.tensors.values()
    floats = [tensor for tensor in every if tensor.dtype.is_floating_point]
    moved = [t for t in floats if t.name not in names or t.dtype is not dtype]
    return sum(t.nbytes // t.dtype.itemsize * dtype.itemsize for t in moved)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """In which every stored value is exact: that of the tensors, where they have one."""
    if checkpoint.w8a8:
        return F64
    found = {t.dtype for t in checkpoint.tensors.values() if t.dtype.is_floating_point}
    return found.pop() if len(found) == 1 else torch.float32


def _floats(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The float tensors by their names, mapped, but for those that describe what is quantized."""
    taken = {name for linear in checkpoint.w8a8.values() for name in linear.tensors.values()}
    kv = [side for pair in checkpoint.kv.values() for side in pair]
    taken |= {name for side in kv for name in (side.scale, side.offset) if name}
    return {
        name: checkpoint.read(name)
        for name, tensor in checkpoint.tensors.items()
        if name not in taken and tensor.dtype.is_floating_point
    }


def _linears(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The float weights and biases that linears in W8A8 stand for."""
    found = {}
    for module, linear in checkpoint.w8a8.items():
        dynamic_only = linear.activations == "dynamic" and linear.bias is None
        for part in ("weight",) if dynamic_only else ("weight", "bias"):
            made = linear_expression(checkpoint, module, part)
            found[f"{module}.{part}"] = make_exact(made, checkpoint.read)
    return found


def _loaded(
    checkpoint: Checkpoint, config: PretrainedConfig, stored: Mapping[str, Tensor]
) -> nn.Module:
    where = checkpoint.path.name
    try:
        with quiet():
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model, info = kind.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=dict(stored),
                dtype=_dtype(checkpoint),
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
    except FOREIGN as error:
        what = f"transformers cannot load it ({first_line(error)})"
        raise ModelError(where, what, "check that config.json belongs to it") from error
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(weights & set(info["missing_keys"])):
        what = f"has no tensor {missing[0]}, which transformers' own model needs"
        raise ModelError(where, what, "check that config.json belongs to these weights")
    assert isinstance(model, nn.Module)
    return model


def _make_constants(model: nn.Module, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Round what a model's code makes in the model's dtype, as Gemma's scale of its embedding.

    The dtype that weights are loaded in is that of the files, and need not be the one meant.
    """
    with torch.device("meta"), quiet():
        wide = AutoModelForCausalLM.from_config(config, dtype=F64)
    for name, buffer in wide.named_buffers():
        where, _, last = name.rpartition(".")
        module = model.get_submodule(where)
        if buffer.dtype is F64 and last in module._non_persistent_buffers_set:
            module._buffers[last] = torch.empty(buffer.shape, dtype=dtype)
            # Which leaves alone what was loaded, and makes the rest.
            model._init_weights(module)  # type: ignore[operator]


Room = dict[tuple[int, torch.Size], Tensor]
Held = Sequence[tuple[nn.Module, str, StoredTensor | Tensor]]


def _let_go(model: nn.Module, path: str, stored: Mapping[int, StoredTensor]) -> None:
    """Take the data from all parameters, and give it to those of a layer while the layer runs.

    A parameter that lies where a stored tensor is mapped is read again; others are kept.
    """
    layers = list(model.get_submodule(path).children())
    inside = {module for layer in layers for module in layer.modules()}
    parts = [(layer, list(layer.modules())) for layer in layers]
    parts += [(module, [module]) for module in model.modules() if module not in inside]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    room: Room = {}
    for whole, modules in parts:
        held = [
            (module, name, stored.get(parameter.data_ptr(), parameter))
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        by_rows = bool(held) and isinstance(held[0][2], StoredTensor)
        if by_rows and whole is head and type(whole) is nn.Linear:
            whole.forward = partial(_in_blocks, held)  # type: ignore[method-assign]
        elif held:
            rows = by_rows and whole is table
            fill = _fill_rows if rows else partial(_fill, room if whole in layers else {})
            whole.register_forward_pre_hook(partial(fill, held))
            whole.register_forward_hook(partial(_empty, held))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = _without_data(parameter)


def _without_data(parameter: Tensor | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(torch.empty_like(parameter, dtype=F64, device="meta"), requires_grad=False)


def _data(source: StoredTensor | Tensor) -> Tensor:
    return load(source) if isinstance(source, StoredTensor) else source


def _fill(room: Room, held: Held, *_: object) -> None:
    """Give parameters their data, in the memory that those of the layer before had.

    Given back to the C library and asked for again, it would soon lie in pieces too small to use.
    """
    with _disable_current_modes():
        for place, (module, name, source) in enumerate(held):
            shape = module._parameters[name].shape  # type: ignore[union-attr]
            kept = room.setdefault((place, shape), torch.empty(shape, dtype=F64))
            module._parameters[name] = nn.Parameter(kept.copy_(_data(source)), requires_grad=False)


def _fill_rows(held: Held, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give an embedding the rows of its tokens; gives the tokens as places among these."""
    [(_, name, source)], (tokens, *rest) = held, given
    assert isinstance(source, StoredTensor)
    found, places = rows_of(source, tokens)
    module._parameters[name] = nn.Parameter(found, requires_grad=False)
    module.padding_idx = None  # type: ignore[assignment]  # is of training, no place here
    return places, *rest


def _in_blocks(held: Held, x: Tensor) -> Tensor:
    """What a linear gives that is as wide as the vocabulary."""
    (_, _, weight), *bias = held
    assert isinstance(weight, StoredTensor)
    with _disable_current_modes():
        return in_blocks(x, weight, *(_data(source) for _, _, source in bias))


def _empty(held: Held, *_: object) -> None:
    for module, name, _source in held:
        module._parameters[name] = _without_data(module._parameters[name])


def _add_norm_biases(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Add after norms the biases that an anti-outlier method gave them."""
    modules = dict(model.named_modules())
    for name in checkpoint.tensors:
        module = modules.get(name.removesuffix(".bias"))
        if not name.endswith("norm.bias") or module is None or "bias" in module._parameters:
            continue
        bias = checkpoint.read(name).to(F64)
        module.register_forward_hook(lambda _, __, gave, bias=bias: gave + bias)


@contextmanager
def _watching(
    model: nn.Module, watched: Callable[[str], bool], seen: ModuleValues
) -> Iterator[None]:
    def note(name: str, _: nn.Module, took: tuple[object, ...], gave: object) -> None:
        results = gave if isinstance(gave, tuple | list) else (gave,)
        seen.gave[name] = [x for x in results if isinstance(x, Tensor)]
        if took and isinstance(took[0], Tensor):
            seen.took[name] = took[0]

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if watched(name)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
