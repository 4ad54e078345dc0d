"""Every stored tensor of a captured model is used, known to be spare, or reported."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.steps import step, values
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint, read_files
from kvc8.ir.errors import ModelError
from kvc8.ir.expression import stored_names
from kvc8.ir.run import run
from kvc8.ir.text import show
from kvc8.tools.inspect import find
from kvc8.tools.inspector.seen import look

pytestmark = pytest.mark.slow  # a capture each
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8.safetensors", "quant_model_description.json"
TOKENS = [5, 9, 17, 33, 65, 12, 101, 7]
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "gate_proj": "up_proj"}
NORMS = ("model.layers.1.input_layernorm", "model.norm")


def changed(name: str, directory: Path, **tensors: Tensor) -> Path:
    """A golden directory with some of its tensors replaced, or more of them."""
    directory = directory / "model"
    shutil.copytree(CHECKPOINTS / name / "quant", directory)
    whole = load_file(directory / WEIGHTS) | tensors
    labels = json.loads((directory / DESCRIPTION).read_text())
    (directory / WEIGHTS).unlink()  # it is mapped: not to be written over
    (directory / DESCRIPTION).unlink()
    save_file(whole, directory / WEIGHTS)
    more = {n: "FLOAT" for n in tensors if n not in labels}
    (directory / DESCRIPTION).write_text(json.dumps(labels | more))
    return directory


@pytest.mark.parametrize("name", sorted(p.name for p in CHECKPOINTS.iterdir() if p.is_dir()))
def test_each_tensor_that_msmodelslim_wrote_is_used_or_spare(name: str) -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / name / "quant")
    program = capture(checkpoint)  # a warning would be an error
    expressions = [
        node.meta["expression"] for node in program.graph.nodes if "expression" in node.meta
    ]
    used = {tensor for expression in expressions for tensor in stored_names(expression)}
    spare = set(checkpoint.tensors) - used
    zeros = ("norm.bias", "weight_offset", "kv_cache_offset")
    for tensor in spare:
        if tensor.endswith(zeros):
            assert not checkpoint.read(tensor).any()
        elif ".module." in tensor:
            first = checkpoint.read(tensor.replace(".module.", "."))
            assert torch.equal(checkpoint.read(tensor), first)
        elif tensor.endswith(("input_scale", "input_offset")):  # q, k and v share an input
            module, _, part = tensor.rpartition(".")
            first = SHARED[module.rpartition(".")[2]]
            twin = f"{module.rpartition('.')[0]}.{first}.{part}"
            assert twin in used
            assert torch.equal(checkpoint.read(tensor), checkpoint.read(twin))
        elif tensor.endswith(".bias"):  # W8A8: it is inside of quant_bias
            assert tensor.replace(".bias", ".quant_bias") in used
        else:
            assert tensor.endswith(".weight_scale")


def test_biases_that_anti_outlier_methods_give_to_norms_are_added(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    biases = {norm: torch.randn(64, generator=random) for norm in NORMS}
    zeros = {f"model.layers.{i}.post_attention_layernorm.bias": torch.zeros(64) for i in range(4)}
    (tmp_path / "model.safetensors").unlink()
    save_file(
        tensors | zeros | {f"{norm}.bias": bias for norm, bias in biases.items()},
        tmp_path / "model.safetensors",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager")
    for norm, bias in biases.items():
        model.get_submodule(norm).register_forward_hook(lambda _m, _x, out, bias=bias: out + bias)
    with torch.no_grad():
        want = model(torch.tensor([TOKENS])).logits[0]
    program = capture(open_checkpoint(tmp_path))
    got = run(program, {**values(program, tmp_path), **step(TOKENS, [0], [8], [[7, 2]])})[0]
    assert (got - want).abs().max() < 1e-5  # as test_capture, of which this is a case
    assert len(re.findall(r"\n +norm_bias\w*: .+ = aten.add.Tensor\(mul", show(program))) == 2
    said = [f"{f.severity}: {f}" for f in find(look(read_files(tmp_path))) if f.kind == "norm-bias"]
    assert said == [
        "note: the directory: model.layers.1.input_layernorm.bias, model.norm.bias of an "
        "anti-outlier method are not zero, so a runtime that leaves out biases of norms answers "
        "wrongly; kvc8 adds them; compare answers before use"
    ]


def test_a_bias_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    bias = {"model.layers.0.mlp.down_proj.bias": torch.ones(256)}
    with pytest.raises(ModelError) as raised:
        capture(open_checkpoint(changed("llama_fp16_m3", tmp_path, **bias)))
    assert str(raised.value) == (
        "model: model.layers.0.mlp.down_proj.bias is not zero and the model has no such bias; "
        "quantize with anti-outlier method m3 or none"
    )


def test_weights_that_are_not_symmetric_are_refused(tmp_path: Path) -> None:
    offset = {"model.layers.0.self_attn.q_proj.weight_offset": torch.ones(256, 1).half()}
    with pytest.raises(ModelError) as raised:
        capture(open_checkpoint(changed("llama_fp16_m3", tmp_path, **offset)))
    assert str(raised.value) == (
        "model: model.layers.0.self_attn.q_proj.weight_offset is not zero; "
        "quantize the weights symmetrically (w_sym=True)"
    )


def test_a_tensor_that_nothing_uses_is_reported(tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.gate.weight": torch.ones(2, 2).half()}
    directory = changed("llama_fp16_m3", tmp_path, **more)
    sentence = (
        "model: holds model.layers.0.self_attn.gate.weight, which the model does not use; "
        "check that config.json belongs to these weights"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(sentence)}$"):
        capture(open_checkpoint(directory))
    said = [
        f"{f.severity}: {f}" for f in find(look(read_files(directory))) if f.kind == "unused-tensor"
    ]
    assert said == [
        "warning: the directory: holds model.layers.0.self_attn.gate.weight, which the model does "
        "not use, so it has no effect; check that config.json belongs to these weights"
    ]
