"""A tiny model made here, compiled in every form, and run node by node beside its emulation.

Two layers of ten query heads and one KV head of 128, which the NPU's attention takes with ND and
with NZ pages, in W8A8 with zero points a channel in the cache. Its numbers are seeded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.backends.npu import artifact_reader
from kvc8.backends.npu.artifact_reader import Artifact
from kvc8.backends.npu.dumps import Difference, ValueDump, again
from kvc8.backends.npu.graphs import Recorder
from kvc8.backends.runtime.generate import generate
from kvc8.backends.runtime.model import Model, load, make_parameters
from kvc8.ir.checkpoint.w8a8 import Range, quantize_linear
from kvc8.ir.program import Program
from kvc8.passes.options import Options
from kvc8.tools.device_checker.bounds import Within, within
from kvc8.tools.device_checker.comparison import step
from kvc8.tools.device_checker.engine_graphs import GraphEngine
from kvc8.tools.device_checker.machine import CPU, Machine
from kvc8.tools.driver.compiling import compile_model
from kvc8.tools.driver.request import Target, open_calibrated
from kvc8.tools.quantizer.writer import Entry, write_json, write_tensors

HIDDEN, WIDTH, HEADS, DIM, VOCABULARY, LAYERS = 80, 96, 10, 128, 128, 2
BLOCK, BLOCKS, STEPS = 128, 8, 4
PROMPTS = [[5, 6, 7, 11, 13], [9, 8] * 20]
CHUNK = 32  # the second prompt takes two, so that all three phases run
EAGER, NPU_GRAPH, GE_GRAPH = "eager", "graph", "GE graph"
FORMS: Mapping[str, tuple[str, Options]] = {
    "fused": ("float16", Options()),
    "unfused": ("float16", Options(fuse="off")),
    "all folds": ("float16", Options(fold="kv")),
    "prompts read int8": ("float16", Options(prefill_kv="int8")),
    "a scale a token": ("float16", Options(kv_scales_by="token")),
    "NZ": ("bfloat16", Options(kv_format="nz", fold="kv")),
    "NZ, unfused": ("bfloat16", Options(kv_format="nz", fold="kv", fuse="off")),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": DIM,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "quantize": "w8a8",
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN), "self_attn.k_proj": (DIM, HIDDEN),
    "self_attn.v_proj": (DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (WIDTH, HIDDEN), "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}  # fmt: skip


def write_model(directory: Path, dtype: str) -> None:
    """Write the model as msModelSlim would: config, tensors and their description."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {**CONFIG, "torch_dtype": dtype})
    made = _tensors(getattr(torch, dtype))
    labels = {n: "C8" if "kv_cache" in n else _label(n) for n in made}
    head = {"version": "1.0.0", "model_quant_type": "W8A8", "kv_cache_type": "C8"}
    marks = {"kvc8": {"kv_calibrated": "post-rope"}}
    write_json(directory / "quant_model_description.json", {**head, **labels, **marks})
    entries = [Entry(n, t.dtype, tuple(t.shape), "") for n, t in made.items()]
    write_tensors(directory / "quant_model_weight_w8a8.safetensors", entries, made.items())


def _label(name: str) -> str:
    return "W8A8" if any(f".{linear}." in name for linear in LINEARS) else "FLOAT"


def _tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    made = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=random).to(dtype),
        "lm_head.weight": (torch.randn(VOCABULARY, HIDDEN, generator=random) / 8).to(dtype),
        "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}.{norm}.weight"] = 1 + torch.randn(HIDDEN, generator=random) / 5
            made[f"{prefix}.{norm}.weight"] = made[f"{prefix}.{norm}.weight"].to(dtype)
        # q, k and v have one input, and so have gate and up
        for linear, shape in LINEARS.items():
            weight = torch.randn(shape, generator=random) * shape[1] ** -0.5
            parts = quantize_linear(weight, None, Range(-4.0, 3.0), dtype)
            made |= {f"{prefix}.{linear}.{part}": tensor for part, tensor in parts.items()}
        for side in "kv":
            name = f"{prefix}.self_attn.{side}_proj.kv_cache"
            made[f"{name}_scale"] = (torch.rand(DIM, generator=random) / 64 + 1 / 32).to(dtype)
            made[f"{name}_offset"] = torch.randint(-9, 9, (DIM,), generator=random).to(dtype)
    return made


def compile_forms(folder: Path, soc: str) -> dict[str, Path]:
    """Compile every form; gives their directories by name."""
    return {name: compile_form(folder, soc, name) for name in FORMS}


def compile_form(folder: Path, soc: str, name: str) -> Path:
    """Compile one form, of a model that forms of its dtype share; gives the directory."""
    dtype, options = FORMS[name]
    source = folder / f"model-{dtype}"
    if not source.exists():
        write_model(source, dtype)
    out = folder / f"compiled-{list(FORMS).index(name)}"
    compile_model(open_calibrated(source), out, Target("npu", soc, BLOCK), options)
    return out


def called_ops(directory: Path) -> tuple[str, ...]:
    """The NPU ops that a compiled form calls."""
    names = set()
    for program in artifact_reader.read(directory).programs.values():
        for node in program.graph.nodes:
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target.namespace in ("npu", "atb"):
                names.add(target._schema.name.partition("::")[2])
    return tuple(sorted(names))


def ways(form: str) -> tuple[str, ...]:
    """How a form is run. torchair has no converter for some fused ops (docs/device.md)."""
    return (EAGER, NPU_GRAPH, GE_GRAPH) if "unfused" in form else (EAGER, NPU_GRAPH)


def compared(machine: Machine, directory: Path, way: str) -> dict[str, Any]:
    """Nodes that differ from what the emulation makes of the device's own inputs; and tokens."""
    artifact = artifact_reader.read(directory)
    on_device = _on(machine, artifact)
    if way != EAGER:
        return _graph_tokens(machine, artifact, on_device, way)
    dump = ValueDump(artifact.programs)
    on_device.runner = dump
    with machine.running():
        tokens = _tokens(on_device)
        machine.synchronize()
    found, far = list[Difference](), list[Difference]()
    for phase, program in artifact.programs.items():
        if any(name.startswith(f"{phase}/") for name in dump.tensors):
            parameters = make_parameters(program, artifact.make, CPU, {})
            new = list(again(phase, program, dump.tensors, parameters))
            found += new
            far += [x for x in new if x.most and _is_far(x, program, dump.tensors, parameters)]
    emulated = _tokens(load(artifact.programs, artifact.make, blocks=BLOCKS, block_size=BLOCK))
    return {
        "outcome": "off by more" if far else "equal",
        "nodes": len(found),
        "differ": [[x.phase, x.node, x.op, x.differ, x.values, _number(x.most)] for x in far],
        "same tokens": tokens == emulated,
    }


def _on(machine: Machine, artifact: Artifact) -> Model:
    """A compiled form, loaded onto the device."""
    return load(
        artifact.programs,
        artifact.make,
        blocks=BLOCKS,
        block_size=artifact.block_size,
        device=machine.device,
    )


def _graph_tokens(
    machine: Machine, artifact: Artifact, on_device: Model, way: str
) -> dict[str, Any]:
    """Whether steps by graphs give the tokens of eager ones."""
    by_graph = _on(machine, artifact)
    if way == NPU_GRAPH and machine.graphs is not None:
        by_graph.runner = Recorder(machine.graphs, blocks=BLOCKS)
    elif way == GE_GRAPH and machine.engine is not None:
        by_graph.runner = GraphEngine(machine.engine())
    else:
        return {"outcome": "not tried"}
    with machine.running():
        same = _tokens(by_graph) == _tokens(on_device)
        machine.synchronize()
    return {"outcome": "equal" if same else "off by more", "differ": [], "same tokens": same}


def _tokens(model: Model) -> list[list[int]]:
    found = generate(model, PROMPTS, most=STEPS, stops=frozenset(), chunk=CHUNK)
    return [sequence.generated for sequence in found.sequences]


def _is_far(
    each: Difference, program: Program, dump: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> bool:
    """Whether a node's value is farther from its emulation than two right answers may be."""
    names = (f"{each.node}", f"{each.node}.0", f"out/{each.node}")
    value = next((dump[f"{each.phase}/{x}"] for x in names if f"{each.phase}/{x}" in dump), None)
    node = next(n for n in program.graph.nodes if n.name == each.node)
    called = node.op == "call_function" and getattr(node.target, "namespace", "") in ("npu", "atb")
    allowed = Within()
    if called:
        allowed = within(each.op, _given(each.phase, node, {**dump, **parameters}))
    if value is None or not value.is_floating_point():
        return each.most > allowed.codes
    return each.most > (allowed.reach or allowed.steps * step(value))


def _given(phase: str, node: Node, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as the device had them."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    named = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    found = {name: _kept(phase, x, kept) for name, x in named.items()}
    return {name: x for name, x in found.items() if x is not None}


def _kept(phase: str, x: Argument, kept: Mapping[str, Any]) -> Any:
    """A value that was kept; None of memory and whole numbers, which are not."""
    if not isinstance(x, Node):
        return x
    places = (x.name, *(f"{phase}/{at}{x.name}" for at in ("", "in/", "out/")))
    return next((kept[place] for place in places if place in kept), None)


def _number(x: float) -> float | str:
    return x if json.dumps(x) not in ("Infinity", "NaN") else "another shape or dtype"
