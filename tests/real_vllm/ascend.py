"""Let vllm-ascend's own code read directories for it: `python ascend.py SOURCE DIR...`.

SOURCE is an unpacked vllm-ascend (its sdist needs no NPU to be downloaded). Its reader of
descriptions, its W8A8 and C8 methods and the adapters that make parameters run as they are, over
the vLLM that is installed; torch_npu and the rest of vllm_ascend, which want a device, are
stand-ins that compute nothing. For each directory: every linear and attention layer gets its
method, and every stored tensor finds a parameter of its shape and dtype. Then the write of
AscendC8AttentionBackendImpl runs on the directory's scales, and gives what kvc8-evaluate --as does.

Prints a line a directory; exit status 1 where one cannot be read.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch
from safetensors import safe_open
from torch import Tensor, nn

REAL = (
    *("vllm_ascend", "vllm_ascend.quantization", "vllm_ascend.quantization.methods"),
    *(f"vllm_ascend.quantization.{n}" for n in ("modelslim_config", "method_adapters")),
    *("vllm_ascend.quantization.quant_type", "vllm_ascend.quantization.quant_parser"),
    *(f"vllm_ascend.quantization.methods.{n}" for n in ("base", "registry", "kv_c8")),
    "vllm_ascend.quantization.methods.w8a8_static",
)
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class StandIn(ModuleType):
    """A module in which every name is there and means nothing."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a stand-in for torch_npu and for what of vllm_ascend is not to run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = name.split(".")[0] in ("torch_npu", "vllm_ascend") and name not in REAL
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


def install(source: Path) -> None:
    """Make vllm_ascend importable from its source, with stand-ins around what runs."""
    sys.meta_path.insert(0, StandIns())
    package = ModuleType("vllm_ascend")  # its own __init__ patches vLLM for a device
    package.__path__ = [str(source / "vllm_ascend")]
    sys.modules["vllm_ascend"] = package
    import vllm_ascend.utils as utils

    utils.vllm_version_is = lambda version: False
    utils.ASCEND_QUANTIZATION_METHOD = "ascend"
    utils.COMPRESSED_TENSORS_METHOD = "compressed-tensors"
    utils.enable_dsa_cp_with_layer_shard = lambda: False
    parameters = importlib.import_module("vllm.model_executor.parameter")  # on one card
    parameters.get_tensor_model_parallel_rank = lambda: 0  # type: ignore[attr-defined]
    parameters.get_tensor_model_parallel_world_size = lambda: 1  # type: ignore[attr-defined]


def configured(directory: Path) -> object:
    """The engine's quantization config, by the steps that vLLM takes with a directory."""
    from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig

    config = json.loads((directory / "config.json").read_text())
    settings = config.get("quantization_config")  # vLLM: get_quant_config, weight_utils.py
    found = AscendModelSlimConfig.from_config(settings or {})
    reader = importlib.import_module("vllm_ascend.quantization.utils")  # a stand-in
    reader.get_model_file = local_file  # type: ignore[attr-defined]
    found.maybe_update_config(str(directory))
    return found


def local_file(model: str, name: str, revision: object = None) -> Path | None:
    """What the engine finds of a directory that is there."""
    path = Path(model) / name
    return path if path.exists() else None


def layer_of(kind: type) -> nn.Module:
    """A layer that is of `kind` and has nothing else."""
    bases = (kind,) if issubclass(kind, nn.Module) else (nn.Module, kind)
    made = type("Layer", bases, {"__init__": lambda self: nn.Module.__init__(self)})
    made.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    found: nn.Module = made()
    return found


def check(directory: Path) -> str:
    """Read a directory; gives what was seen, or raises what the engine raises."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import LinearBase
    from vllm_ascend.quantization import modelslim_config
    from vllm_ascend.quantization.methods.kv_c8 import AscendC8KVCacheAttentionMethod

    text = json.loads((directory / "config.json").read_text())
    dtype = getattr(torch, str(text.get("dtype") or text["torch_dtype"]))
    torch.set_default_dtype(dtype)
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type=text["model_type"]))
    vllm_config = SimpleNamespace(model_config=model, kv_transfer_config=None)
    for name in ("modelslim_config", "methods.kv_c8"):
        module = sys.modules[f"vllm_ascend.quantization.{name}"]
        module.get_current_vllm_config = lambda: vllm_config  # type: ignore[attr-defined]
    config = configured(directory)
    config.packed_modules_mapping = modelslim_config.packed_modules_model_mapping.get(
        text["model_type"], {name: list(parts) for name, parts in PACKED.items()}
    )
    tensors, seen = stored(directory), set[str]()
    counts = {"W8A8": 0, "float": 0, "C8": 0}
    for index in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        layer = layer_of(AttentionLayerBase)
        method = config.get_quant_method(layer, f"{prefix}.self_attn.attn")
        assert method is not None, f"{prefix}: its cache is not C8"
        assert isinstance(method.quant_method, AscendC8KVCacheAttentionMethod), prefix
        method.create_weights(layer)
        seen |= load_cache(layer, config, f"{prefix}.self_attn", tensors, dtype)
        counts["C8"] += 1
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            linear = layer_of(LinearBase)
            method = config.get_quant_method(linear, f"{prefix}.{name}")
            parts = [
                f"{prefix}.{name.replace(name.split('.')[1], part)}"
                for part in PACKED.get(name.split(".")[1], (name.split(".")[1],))
            ]
            quantized = type(method).__name__ == "AscendLinearMethod"
            labels = {config.quant_description[f"{part}.weight"] for part in parts}
            assert labels == {"W8A8" if quantized else "FLOAT"}, (name, labels, method)
            counts["W8A8" if quantized else "float"] += 1
            if quantized:
                seen |= load_linear(linear, method, parts, tensors, dtype)
    left = [name for name in tensors if name not in seen and tensors[name].dtype != dtype]
    assert not left, f"no parameter for {left[:3]}"
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every file, as vLLM reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                assert name not in found, f"{name} is stored twice"
                found[name] = file.get_tensor(name)
    return found


def load_cache(
    layer: nn.Module, config: object, prefix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> set[str]:
    """Load a layer's KV scales by the engine's own loader; gives the tensors that it took."""
    seen = set()
    for side in "kv":
        for part in ("scale", "offset"):
            name = f"{prefix}.{side}_proj.kv_cache_{part}"
            target = config.get_cache_scale(name)  # type: ignore[attr-defined]
            assert target == f"{prefix}.attn.{side}_cache_{part}", target
            parameter = getattr(layer, target.rpartition(".")[2])
            assert parameter.dtype is tensors[name].dtype is dtype, name
            parameter.weight_loader(parameter, tensors[name])
            assert torch.equal(parameter.data, tensors[name]), name
            seen.add(name)
    return seen


def load_linear(
    layer: nn.Module,
    method: object,
    parts: list[str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> set[str]:
    """Make a packed linear's parameters; each stored part must fit its slice of one."""
    sizes = [len(tensors[f"{part}.weight"]) for part in parts]
    width = tensors[f"{parts[0]}.weight"].shape[1]
    method.create_weights(  # type: ignore[attr-defined]
        layer, width, sizes, width, sum(sizes), dtype, weight_loader=lambda *_: None
    )
    seen = set()
    for name, parameter in layer.named_parameters():
        if f"{parts[0]}.{name}" not in tensors:  # msModelSlim's newer command leaves these out
            assert name in method.get_computed_params(), name  # type: ignore[attr-defined]
            continue
        given = [tensors[f"{part}.{name}"] for part in parts]
        whole = torch.cat(given) if parameter.shape[0] == sum(sizes) else given[-1]
        assert whole.shape == parameter.shape, (parts, name, whole.shape, parameter.shape)
        assert whole.dtype is parameter.dtype, (parts, name, whole.dtype, parameter.dtype)
        if parameter.shape[0] != sum(sizes):  # one slot, and the last that is loaded stays
            assert all(torch.equal(one, given[0]) for one in given), (parts, name)
        seen |= {f"{part}.{name}" for part in parts}
    return seen


def engines_own(source: Path) -> Mapping[str, Callable[..., object]]:
    """The functions of AscendC8AttentionBackendImpl that are plain torch, out of its file."""
    text = (source / "vllm_ascend" / "attention" / "attention_v1.py").read_text()
    [owner] = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == "AscendC8AttentionBackendImpl"
    ]
    wanted = (
        "_prepare_c8_scales",
        "_quantize_kv_to_int8",
        "_dequant_paged_kv_to_dense",
        "_nz_5d_view",
    )
    body = [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    names: dict[str, object] = {"torch": torch, "AttentionLayer": object, "AscendMetadata": object}
    names |= {
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    }
    exec(compile(ast.Module(body, []), "attention_v1.py", "exec"), names)
    return {name: names[name] for name in wanted}  # type: ignore[misc]


def check_arithmetic(source: Path, directory: Path) -> str:
    """Compare kvc8-evaluate's write and chunk read with the engine's code, bit for bit."""
    from kvc8.tools.engines.arithmetic import vllm_chunk, vllm_write

    own, tensors = engines_own(source), stored(directory)
    scales = {k: v for k, v in tensors.items() if k.endswith("kv_cache_scale")}
    config = json.loads((directory / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    random, codes = torch.Generator().manual_seed(0), 0
    for name in [n for n in scales if ".k_proj." in n]:
        k, v = scales[name], scales[name.replace("k_proj", "v_proj")]
        heads = len(k) // dim
        layer = SimpleNamespace(
            k_cache_scale=k,
            v_cache_scale=v,
            k_cache_offset=torch.zeros_like(k),
            v_cache_offset=torch.zeros_like(v),
        )
        impl = SimpleNamespace(num_kv_heads=heads, head_size=dim)
        own["_prepare_c8_scales"](impl, layer, torch.device("cpu"))
        rows = torch.randn(64, heads, dim, generator=random, dtype=torch.float32)
        rows = (rows * 60 * k.float().reshape(heads, dim)).to(k.dtype)
        theirs, _ = own["_quantize_kv_to_int8"](impl, rows, rows, layer, 64)  # type: ignore[misc]
        wide = k.float().reshape(heads, dim)
        ours = vllm_write(rows, wide, None)
        assert torch.equal(ours, theirs), name
        dense = theirs.to(rows.dtype) * layer._c8_k_scale
        assert torch.equal(vllm_chunk(ours, wide, None, rows.dtype), dense.reshape(ours.shape))
        codes += ours.numel()
    return f"{codes:,} codes as the engine's own"


def main() -> int:
    """Check each directory; gives the exit status."""
    source, *directories = map(Path, sys.argv[1:])
    install(source)
    failed = 0
    for directory in directories:
        try:
            print(f"{directory.name}: {check(directory)}; {check_arithmetic(source, directory)}")
        except (AssertionError, KeyError, ValueError, NotImplementedError) as error:
            print(f"{directory.name}: not read: {type(error).__name__}: {error}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
