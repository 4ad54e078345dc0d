"""K scales measured before RoPE: which channels pair up, what a repair bounds, what it says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.pre_rope import write_pre_rope
from torch import Tensor

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint, read_files
from kvc8.ir.errors import IRError, ModelError
from kvc8.ir.expression import Expression, make
from kvc8.ir.program import Program, expression_of
from kvc8.ir.text import parse
from kvc8.passes.repair_rope_scales import __doc__ as document
from kvc8.passes.repair_rope_scales import repair_rope_scales
from kvc8.tools import command
from kvc8.tools import compile as tool
from kvc8.tools.driver.request import open_calibrated
from kvc8.tools.inspect import find
from kvc8.tools.inspector.seen import look

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
NO_ROPE = "no RoPE lies between its k_proj and the cache"
Partner = Callable[[int], int]


def half(width: int) -> Partner:
    """Half-split: channel i and channel i + width / 2."""
    return lambda i: i if i >= width else (i + width // 2) % width


def every_other(width: int) -> Partner:
    """Interleaved: channels 2i and 2i + 1."""
    return lambda i: i if i >= width else i ^ 1


def alone(i: int) -> int:
    return i


# Which channel pairs with which, by layer, in heads of 16.
ARCHITECTURES: dict[str, tuple[str, dict[str, object], list[Partner], float]] = {
    "llama": ("llama", {}, [half(16)] * 2, 1.0),
    "all heads": ("llama", {"num_key_value_heads": 4}, [half(16)] * 2, 1.0),
    "biases": ("qwen2", {}, [half(16)] * 2, 1.0),
    "yarn": ("qwen2", {"rope_parameters": YARN}, [half(16)] * 2, 0.1 * 1.3862943611 + 1),
    "partial": ("stablelm", {"partial_rotary_factor": 0.25}, [half(4)] * 2, 1.0),
    "partial, biases": ("phi", {"partial_rotary_factor": 0.5}, [half(8)] * 2, 1.0),
    "interleaved": ("cohere", {}, [every_other(16)] * 2, 1.0),
    "interleaved, partial": (
        "glm",
        {"head_dim": 16, "partial_rotary_factor": 0.5},
        [every_other(8)] * 2,
        1.0,
    ),
    "interleaved, none in layer 1": (
        "cohere2",
        {
            "head_dim": 16,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        [every_other(16), alone],
        1.0,
    ),
    "none in layer 1": (
        "smollm3",
        {"no_rope_layers": [1, 0], "use_sliding_window": False},
        [half(16), alone],
        1.0,
    ),
}


def k_scales(program: Program, checkpoint: Checkpoint) -> list[Tensor]:
    """The K scales [H, D] that each layer's cache will have."""
    found = []
    for cache in program.caches()[::2]:
        scale = expression_of(cache).args[0]
        assert isinstance(scale, Expression)
        found.append(make(scale, checkpoint.read))
    return found


def clipped(rows: Tensor, scale: Tensor) -> float:
    """The share of values [H, T, D] that quantize would cut off."""
    codes = torch.round(rows.float() / scale[:, None])
    return float(((codes > 127) | (codes < -128)).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_pairs_its_own_channels(name: str, tmp_path: Path) -> None:
    kind, config, partners, factor = ARCHITECTURES[name]
    rows = write_pre_rope(tmp_path, kind, **config)
    checkpoint = open_checkpoint(tmp_path)
    program = capture(checkpoint)
    before = k_scales(program, checkpoint)
    remarks = repair_rope_scales(program, read=checkpoint.read)
    after = k_scales(program, checkpoint)
    for layer, partner in enumerate(partners):
        other = before[layer][:, [partner(i) for i in range(16)]].double()
        turned = torch.tensor([partner(i) != i for i in range(16)])
        bound = (before[layer].double().square() + other.square()).sqrt() * factor
        expected = torch.where(turned, bound, before[layer].double())
        # a float32 factor, square root and rounding up: three roundings, each one part in 2^23
        assert torch.allclose(after[layer].double(), expected, rtol=3 * 2.0**-23, atol=0)
        assert clipped(rows[layer], after[layer]) == 0
        if partner is alone:
            assert remarks[layer].why_not == NO_ROPE
            assert clipped(rows[layer], before[layer]) == 0
        else:
            ratio = float((after[layer] / before[layer]).max())
            assert f"K scales grow up to {ratio:.2f} times" in remarks[layer].note
            assert clipped(rows[layer], before[layer]) > 0


@pytest.mark.slow
def test_a_layer_without_rope_is_told_by_inspect(tmp_path: Path) -> None:
    write_pre_rope(tmp_path, "smollm3", no_rope_layers=[1, 0], use_sliding_window=False)
    said = [
        str(finding) for finding in find(look(read_files(tmp_path))) if finding.kind == "no-rope"
    ]
    assert said == [
        "K of layer 1: no RoPE lies between k_proj and the cache, so its scales hold as they are; "
        "leave them alone"
    ]


@pytest.mark.slow
def test_scales_measured_before_a_norm_are_refused(tmp_path: Path) -> None:
    write_pre_rope(tmp_path, "qwen3", head_dim=16)
    program = capture(open_checkpoint(tmp_path))
    with pytest.raises(IRError) as raised:
        repair_rope_scales(program)
    assert str(raised.value) == (
        "model.layers.0.self_attn: its K scales were measured at k_proj and a norm follows it; "
        "quantize again after RoPE"
    )
    said = [f"{f.severity}: {f}" for f in find(look(read_files(tmp_path))) if f.kind == "k-norm"]
    assert said == [
        "error: K of layers 0-1: a norm follows k_proj, where the scales were measured, so they "
        "say nothing about what the cache holds; "
        "quantize with kvc8-quantize, which measures what is cached"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_fp16_m3", "qwen2_fp16_none_asym"])
def test_a_repair_ends_the_clipping_of_msmodelslims_own_scales(name: str) -> None:
    """On the texts of the calibration, K as the float model caches it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / name / "orig", dtype=torch.float16, attn_implementation="eager"
    )
    tokens = json.loads((GOLDEN / name / "calib.json").read_text())["input_ids"]
    with torch.no_grad():
        caches = [model(torch.tensor(t).reshape(1, -1)).past_key_values for t in tokens]
    checkpoint = open_checkpoint(GOLDEN / name / "quant")
    program = capture(checkpoint)
    before = k_scales(program, checkpoint)
    zeros = [expression_of(cache).args[1] for cache in program.caches()[::2]]
    repair_rope_scales(program)
    after = k_scales(program, checkpoint)
    for layer in range(4):
        rows = torch.cat([cache.layers[layer].keys[0] for cache in caches], 1)
        zero = zeros[layer]
        moved = make(zero, checkpoint.read) if isinstance(zero, Expression) else torch.zeros(2, 32)
        as_is = clipped(rows.float() + (moved * before[layer])[:, None], before[layer])
        assert as_is > 0.01  # shared/golden: 2.8 to 6.1 % for such models
        assert clipped(rows, after[layer]) == 0


def text_of(what: str) -> str:
    assert document is not None
    lines = document.split(f"{what}:\n")[1].split("\n\n")[0]
    return "\n".join(line.removeprefix("    ") for line in lines.splitlines())


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (1.0, "K scales grow up to 1.41 times; up to 29% of what a channel can reach was cut off"),
        (0.0, "the checkpoint holds no scales to compare"),
    ],
)
def test_the_remark_says_what_a_repair_changes(scale: float, told: str) -> None:
    program = parse(text_of("before"))
    remarks = repair_rope_scales(program, read=lambda _: torch.full((2, 8), scale))
    assert [remark.note for remark in remarks] == [f"channels paired by half, 4 apart; {told}"]


def test_a_channel_that_its_partner_outgrows_has_the_largest_ratio() -> None:
    program = parse(text_of("before"))
    scale = torch.ones(2, 8)
    scale[1, 6] = 4.0  # pairs with channel 2: sqrt(1 + 16) = 4.12
    remarks = repair_rope_scales(program, read=lambda _: scale)
    assert remarks[0].note.endswith(
        "K scales grow up to 4.12 times; up to 76% of what a channel can reach was cut off"
    )


@pytest.mark.slow
def test_where_k_was_measured_can_be_overruled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(GOLDEN / "llama_fp16_m3" / "quant"), "--target", "npu"]
    arguments += ["-o", str(tmp_path / "out"), "--kv-calibrated", "post-rope"]
    assert command.entry(tool.parser(), tool.work, arguments) == 0
    said = "repair_rope_scales: 4 sites left alone: its scales were measured after RoPE\n"
    assert said in capsys.readouterr().out


def test_overruling_wants_scales() -> None:
    directory = GOLDEN / "llama_fp16_m3" / "orig"
    with pytest.raises(ModelError) as raised:
        open_calibrated(directory, "pre-rope")
    assert str(raised.value) == (
        f"{directory}: holds no KV scales for --kv-calibrated to speak of; "
        "leave it out, or quantize with kvc8-quantize"
    )
