"""Rotated models compute what they did; shown in float64, where rounding hides no mistake."""

import pytest
import torch
from support.tiny_models import write_model
from torch.fx import Node

from kvc8.ir.capture.original import open_original
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint import layouts
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.program import Program, expression_of, is_parameter, substitute
from kvc8.ir.verify import verify
from kvc8.tools.quantizer.transforms.orthogonal import hadamard, random_orthogonal
from kvc8.tools.quantizer.transforms.rotation import (
    Rotation,
    find_rotation,
    rotate,
    untie,
    untied_bytes,
)

TOKENS = [5, 17, 90, 3, 44, 44, 101, 7, 8, 9, 60, 2]


@pytest.mark.parametrize("size", [1, 2, 12, 64, 96, 576, 35])
def test_a_map_is_orthogonal_and_spreads(size):
    made = random_orthogonal(size, seed=3)
    matrix = made.turn(torch.eye(size, dtype=torch.float64))
    # log2(size) additions and m products of numbers below one, each rounded to 2**-53
    assert (matrix @ matrix.t() - torch.eye(size)).abs().max() < 2 * size * 2.0**-53 * 10
    power = size & -size
    assert matrix.abs().max() <= power**-0.5 + 1e-12  # no channel keeps more than its share
    scale = torch.linspace(0.5, 2, size, dtype=torch.float64)
    x = torch.linspace(-1, 1, 3 * size, dtype=torch.float64).view(3, size)
    assert torch.allclose(made.turn(x, scale), (x * scale) @ matrix, rtol=0, atol=1e-12)
    assert torch.equal(random_orthogonal(size, seed=3).turn(x), made.turn(x))


def test_the_hadamard_transform_is_its_matrix():
    rows = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(8)] for i in range(8)]
    matrix = torch.tensor(rows, dtype=torch.float64) * 8**-0.5
    x = torch.arange(48, dtype=torch.float64).view(2, 8, 3)
    assert torch.allclose(hadamard(x), matrix @ x, rtol=0, atol=1e-12)


@pytest.fixture
def doubles(monkeypatch):
    """Checkpoints may be stored in float64, which no engine reads and so no reader takes."""
    monkeypatch.setattr(layouts, "FLOATS", (*layouts.FLOATS, "float64"))


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    found, _ = open_original(checkpoint, torch.float64).run(TOKENS)
    return found


def rotation_of(checkpoint: Checkpoint, residual: bool) -> Rotation:
    found = find_rotation(capture(checkpoint, torch.float32), residual, seed=5)
    assert isinstance(found, Rotation)
    return found


# What stands for each way of being built: a rotated stream, V turned in its heads, or both.
ROTATED: dict[str, tuple[str, dict[str, object]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "no powers of two": ("llama", {"hidden_size": 96, "head_dim": 24}),
    "biases of q, k and v": ("qwen2", {}),
    "norms of q and k": ("qwen3", {}),
    "1 + w, a scaled embedding": ("gemma", {"head_dim": 16, "hidden_size": 48}),
    "packed linears": ("phi3", {}),
    "packed gate, V in a slice": ("glm", {"head_dim": 16}),
    "factors": ("granite", {"residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "norms without weights": ("nanochat", {}),
    "experts": ("qwen3_moe", {}),
    "a shared expert and its gate": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "groups of experts": ("glm4_moe", {}),
    "experts in one tensor": ("granitemoe", {}),
    "w1 and w2": ("minimax_m2", {}),
}


@pytest.mark.slow
@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_model_computes_what_it_did(name, tied, tmp_path):
    """In transformers' own code, in float64."""
    kind, config = ROTATED[name]
    layers = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    write_model(tmp_path / "made", kind, 0, {**layers, **config}, torch.float64)
    source = open_checkpoint(tmp_path / "made")
    want = logits(source)
    for residual in (True, False):
        rotation = rotation_of(source, residual)
        assert (rotation.why, rotation.residual is None) == (None, not residual)
        made = rotate(source, rotation, tmp_path / f"rotated {residual}")
        # Every sum rounds to 2**-53 = 1e-16 of values near one. Norms and softmaxes amplify that by
        # a few powers of ten; a part that is not rotated changes digit one. transformers keeps
        # GLM-4-MoE's router in float32, which rounds what it turns to 2**-24 = 6e-8.
        assert (logits(made) - want).abs().max() < (1e-6 if kind == "glm4_moe" else 1e-10)
        changed = {n for n in source.tensors if not torch.equal(made.read(n), source.read(n))}
        assert any("embed" in name for name in changed) is residual
        assert any("o_proj" in name for name in changed)


@pytest.mark.slow
@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gemma3", "model.layers.0.post_attention_layernorm scales the channels of what is added"),
        ("glm4", "model.layers.0.post_self_attn_layernorm scales the channels of what is added"),
        ("olmo2", "model.layers.0.post_attention_layernorm scales the channels of what is added"),
        ("cohere", "model.layers.0.input_layernorm takes a mean over channels off"),
        ("olmo", "model.layers.0.input_layernorm takes a mean over channels off"),
    ],
)
def test_where_the_stream_cannot_turn_v_does(kind, why, tmp_path):
    layers = {"layer_types": ["full_attention"] * 2} if kind == "gemma3" else {}
    given = {"num_hidden_layers": 2, "head_dim": 16, **layers}
    write_model(tmp_path / "made", kind, 0, given, torch.float64)
    source = open_checkpoint(tmp_path / "made")
    rotation = rotation_of(source, True)
    assert rotation.why is not None
    assert rotation.why.startswith(why)
    assert rotation.why.endswith("the residual stream")
    made = rotate(source, rotation, tmp_path / "rotated")
    assert (logits(made) - logits(source)).abs().max() < 1e-10
    changed = {n for n in source.tensors if not torch.equal(made.read(n), source.read(n))}
    assert {name.split(".")[-2] for name in changed} == {"v_proj", "o_proj"}


def calls(program: Program) -> list[object]:
    """The calls of a program, with what their parameters are made of."""

    def of(node: Node) -> str:
        return str(expression_of(node)) if is_parameter(node) else node.name

    return [
        (node.name, node.target, repr(substitute(node.args, of)), node.meta["origin"])
        for node in program.graph.nodes
        if node.op == "call_function"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_untied_program_is_that_of_the_untied_model(dtype, tmp_path):
    """As it is captured of the rotated directory; also where the stored dtype is another."""
    config = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    write_model(tmp_path / "made", "llama", 0, config, dtype)
    source = open_checkpoint(tmp_path / "made")
    program = capture(source, torch.float32)
    rotation = find_rotation(program, True, seed=0)
    assert isinstance(rotation, Rotation)
    made = rotate(source, rotation, tmp_path / "rotated")
    assert calls(program) != calls(capture(made, torch.float32))
    untie(program, rotation)
    verify(program)
    assert calls(program) == calls(capture(made, torch.float32))


def test_what_is_not_moved_only_is_not_turned(tmp_path):
    """OLMo clamps V before it is cached, and BitNet norms what attention gives."""
    write_model(tmp_path / "olmo", "olmo", 0, {"num_hidden_layers": 1, "clip_qkv": 8.0})
    found = find_rotation(capture(open_checkpoint(tmp_path / "olmo"), torch.float32), False, 0)
    assert found == "model.layers.0.self_attn changes V before it is cached"
    write_model(tmp_path / "bitnet", "bitnet", 0, {"num_hidden_layers": 1})
    found = find_rotation(capture(open_checkpoint(tmp_path / "bitnet"), torch.float32), False, 0)
    what = "has something between attention and its linear"
    assert found == f"model.layers.0.self_attn {what}"


def test_a_tensor_of_two_uses_is_not_turned(tiny_model):
    program = capture(open_checkpoint(tiny_model("llama", num_hidden_layers=1)), torch.float32)
    [norm] = [n for n in program.parameters() if n.name.endswith("input_layernorm_weight")]
    program.call(next(iter(norm.users)), torch.ops.aten.neg.default, norm)
    found = find_rotation(program, True, seed=0)
    assert isinstance(found, Rotation)
    assert found.why is not None
    assert found.why.endswith("uses model.layers.0.input_layernorm.weight too")


def test_a_tied_head_is_untied_and_told(tiny_model, tmp_path):
    source = open_checkpoint(tiny_model("llama", tied=True))
    made = rotate(source, rotation_of(source, True), tmp_path / "made")
    assert made.config["tie_word_embeddings"] is False
    assert untied_bytes(source, made) == 128 * 64 * 4
    assert made.path == source.path
    heads = rotate(source, rotation_of(source, False), tmp_path / "heads")
    assert (untied_bytes(source, heads), heads.config) == (0, source.config)


def test_what_stays_in_bfloat16_is_not_turned(tmp_path):
    write_model(tmp_path, "llama", 0, {"num_hidden_layers": 1}, torch.bfloat16)
    program = capture(open_checkpoint(tmp_path), torch.float32)
    assert find_rotation(program, False, 0, coarse=True) == "bfloat16 would round what is turned"
    assert isinstance(find_rotation(program, True, 0, coarse=True), Rotation)
