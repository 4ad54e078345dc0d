"""Models with experts: captured, and each expert's linears quantized with their own ranges."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.steps import step, values
from transformers import AutoModelForCausalLM

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.run import run
from kvc8.ir.text import parse, show
from kvc8.tools import command, quantize
from kvc8.tools.driver.tokenizer import read_tokenizer

pytestmark = pytest.mark.slow
TEXTS = ("The sea is a very large thing.", "12 + 30 = 42")
TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11]


def logits(directory: Path) -> torch.Tensor:
    program = capture(open_checkpoint(directory), torch.float32)
    given = step(TOKENS, [0], [len(TOKENS)], [[0, 1, 2]])
    return run(program, {**values(program, directory), **given})[0]


def test_the_program_computes_what_transformers_computes(tiny_model):
    model = tiny_model("qwen3_moe")
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        want = net(torch.tensor([TOKENS])).logits[0]
    # Sums of 64 float32 products in another order, through four layers of values near one.
    assert torch.allclose(logits(model), want, rtol=1e-4, atol=1e-4)


def test_its_text_reads_back(tiny_model):
    program = capture(open_checkpoint(tiny_model("qwen3_moe")))
    assert len(program.calls(ops.grouped_linear)) == 4 * 2
    assert show(parse(show(program))) == show(program)


def test_rows_go_to_the_expert_whose_they_are():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 8), torch.randn(3, 8, 5)
    got = ops.grouped_linear(x, weight, torch.tensor([2, 2, 7]))
    assert torch.equal(got[:2], x[:2] @ weight[0])
    assert torch.equal(got[2:], x[2:] @ weight[2])


def seen_by_experts(model: Path) -> dict[str, torch.Tensor]:
    """The values that reach each expert of the float model, by the expert's name."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}

    def look(_, args, name):
        rows, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for expert in chosen.unique().tolist():
            here = (chosen == expert).any(-1)
            seen.setdefault(f"{name}.{expert}", []).append(rows[here].flatten())

    for name, module in net.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, args, name=name: look(m, args, name))
    with torch.no_grad():
        for text in TEXTS:
            net(torch.tensor([read_tokenizer(model).encode(text)]))
    return {name: torch.cat(found) for name, found in seen.items()}


def test_each_expert_has_the_range_that_it_has_seen(tiny_model, tmp_path):
    model, out = tiny_model("qwen3_moe"), tmp_path / "out"
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    given = [str(model), "-o", str(out), "--calib-file", str(path), "--recipe", "minmax"]
    assert command.entry(quantize.parser(), quantize.work, given) == 0
    found, stored = open_checkpoint(out), load_file(out / "quant_model_weight_w8a8.safetensors")
    assert found.warnings == ()
    linears = {f"self_attn.{part}_proj" for part in "qkvo"}
    linears |= {f"mlp.experts.{e}.{part}_proj" for e in range(4) for part in ("gate", "up")}
    assert set(found.w8a8) == {f"model.layers.{i}.{part}" for i in range(4) for part in linears}
    seen = seen_by_experts(model)
    assert len({float(x.min()) for x in seen.values()}) > 8  # they have seen different values
    for name, x in seen.items():
        want = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        for part in ("gate", "up"):
            scale = stored[f"{name}.{part}_proj.input_scale"]
            assert torch.allclose(scale, want, rtol=1e-5)
    # The weights of the captured model are the codes', within half a step of the float ones.
    name = "model.layers.2.mlp.experts.1.gate_proj"
    weight = load_file(model / "model.safetensors")[f"{name}.weight"]
    program = capture(found, torch.float32)
    [node] = [
        n for n in program.parameters() if n.name == "model_layers_2_mlp_experts_gate_up_proj"
    ]
    made = values(program, out)[node.name][1, : len(weight)]
    step_size = stored[f"{name}.weight_scale"]
    assert ((made - weight).abs() <= step_size / 2 * (1 + 1e-4)).all()
