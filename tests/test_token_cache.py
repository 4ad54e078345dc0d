"""A cache whose tokens bring their scales along, against transformers and in every phase."""

import importlib

import numpy as np
import pytest
import torch
from support import c8
from support.replayed import PHASES, replayed
from support.steps import step, values

from kvc8.backends.npu import legality
from kvc8.backends.npu.emulation.attention import npu_fused_infer_attention_score
from kvc8.backends.onnx.emitter import emit
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir import npu, ops
from kvc8.ir.capture.original import open_original
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import IRError, TargetError
from kvc8.ir.expression import Expression, make, stored
from kvc8.ir.precision.widen import widen
from kvc8.ir.run import run
from kvc8.ir.verify import verify
from kvc8.passes import pipeline
from kvc8.passes.fold_kv_scales import fold_kv_scales
from kvc8.passes.lower_paged_attention import lower_paged_attention
from kvc8.passes.options import Options
from kvc8.tools import command, evaluate
from kvc8.tools.driver.faithful import LIMIT
from kvc8.tools.verifier.form_table import double_rows
from kvc8.tools.verifier.forms import Tokens
from kvc8.tools.verifier.recording import Parameters

TOKENS = [5, 17, 90, 3, 44, 44, 101, 7, 8, 61, 12]
BY_TOKEN = Options(kv_scales_by="token", prefill_kv="int8")
SMOOTHING = Expression("smoothing", (stored("s"), None))


def quantized(directory):
    checkpoint = open_checkpoint(directory)
    program = capture(checkpoint, torch.float32)
    pipeline.run(program, pipeline.quantize_passes(BY_TOKEN))
    return checkpoint, program


def smoothing(read, name):
    """(2^e / s)^0.8, 2048 at most, of a scale widened by its zero point."""
    scale = read(f"{name}.kv_cache_scale").float().flatten()
    zero = read(f"{name}.kv_cache_offset").float().flatten()
    far = torch.maximum((-128 - zero).abs(), (127 - zero).abs()) if zero.any() else 127
    reach = (scale * far / 127).numpy()
    power = 2.0 ** np.ceil(np.log2(np.nextafter(reach.max(), np.float32(np.inf))))
    return np.minimum((power / reach.astype(np.float64)) ** 0.8, 2048).astype(np.float32)


def rounded(rows, smooth):
    """[1, H, T, D] as the cache gives it back, in float32 of numpy: no mode of torch widens it."""
    _, heads, tokens, dim = rows.shape
    x = rows[0].transpose(0, 1).reshape(tokens, heads * dim).numpy().astype(np.float32) * smooth
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    codes = np.clip(np.rint(x / scale), -128, 127)
    back = torch.from_numpy((codes * scale / smooth).astype(np.float64))
    return back.view(tokens, heads, dim).transpose(0, 1)[None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant"), [("llama", "symmetric"), ("qwen2", "offsets"), ("gemma3", "symmetric")]
)
def test_it_computes_what_transformers_does_with_rounded_keys(kind, variant, tiny_c8, monkeypatch):
    checkpoint, program = quantized(tiny_c8(kind, "float", variant))
    made = {**values(widen(program), checkpoint.path), **step(TOKENS, [0], [11], [[3, 0, 2]])}
    ours = run(widen(program), made)[0]
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    eager = module.eager_attention_forward

    def attend(layer, query, key, value, *rest, **named):
        where = f"model.layers.{layer.layer_idx}.self_attn"
        k, v = (smoothing(checkpoint.read, f"{where}.{side}_proj") for side in "kv")
        return eager(layer, query, rounded(key, k), rounded(value, v), *rest, **named)

    monkeypatch.setattr(module, "eager_attention_forward", attend)
    theirs, _ = open_original(checkpoint, torch.float32).run(TOKENS)
    assert (ours - theirs).abs().max() < LIMIT * theirs.abs().max()
    monkeypatch.undo()
    plain, _ = open_original(checkpoint, torch.float32).run(TOKENS)
    assert (ours - plain).abs().max() > 1e4 * LIMIT * theirs.abs().max()


def test_smoothing_is_held_by_half_precision_whatever_the_scales_are():
    scales = torch.tensor([[1e-12, 0.25, 3.0], [1e-3, 2.5, 1e-8]])
    smooth = make(SMOOTHING, lambda name: scales)
    wanted = [2048, 16**0.8, (4 / 3) ** 0.8, 4000**0.8, 1.6**0.8, 2048]
    assert smooth.tolist() == pytest.approx(wanted, rel=2**-23)
    for dtype in (torch.float16, torch.bfloat16):
        assert (1 / smooth.to(dtype)).isfinite().all()


def test_a_dead_channel_stays_small():
    """What calibration saw empty has a scale of almost nothing, and is not blown up."""
    rows, smooth = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([2048.0, 1.0])
    codes, scale = ops.quantize_tokens(rows, smooth)
    assert codes.tolist() == [[0, 127], [0, 0]]
    back = ops.dequantize_tokens(codes.view(2, 1, 2), scale.view(2, 1, 1), smooth, torch.float32)
    assert torch.equal(back.view(2, 2), rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "linears"), [("mistral", "w8a8"), ("gemma3", "float")], ids=["window", "both"]
)
def test_every_phase_has_the_codes_of_the_reference_in_double_precision(kind, linears, tiny_c8):
    checkpoint, program = quantized(tiny_c8(kind, linears))
    lowered, remarks = pipeline.lower_for_npu(program, BY_TOKEN)
    parameters = Parameters(checkpoint.read)
    want = replayed(dict.fromkeys(PHASES, program), parameters, TOKENS)
    for a, b in zip(want, replayed(lowered, parameters, TOKENS), strict=True):
        for name, (_, codes) in a.items():
            found = b[name][1].reshape(codes.shape)
            # a scale is a float, and in double precision off by some roundings of 2^-53
            same = torch.equal(found, codes) if "steps" not in name else found.allclose(codes, 1e-9)
            assert same, name
    why = "its tokens have scales of their own"
    assert {r.why_not for name, r in remarks if name == "fuse_rope_quant_cache"} == {why}


@pytest.mark.slow
def test_the_ops_read_pages_with_a_scale_a_token(tiny_model, tmp_path):
    c8.quantize_model(tiny_model("llama", num_hidden_layers=2, head_dim=32), tmp_path / "c8")
    program = capture(open_checkpoint(tmp_path / "c8"), torch.float16)
    pipeline.run(program, pipeline.quantize_passes(BY_TOKEN))
    layers = len(program.calls(ops.paged_attention))
    lowered, _ = pipeline.lower_for_npu(program, BY_TOKEN)
    for phase in lowered.values():
        legality.check(phase, "ascend910b", 128)
        assert len(phase.calls(npu.npu_scatter_pa_kv_cache)) == 2 * layers
    attended = lowered["decode"].calls(npu.npu_fused_infer_attention_score)
    assert [call.kwargs["key_antiquant_mode"] for call in attended] == [4] * layers
    layout = kv_layout(lowered["decode"])
    sizes = [(cache.name, cache.bytes_per_token) for cache in layout.caches]
    assert [name for name, _ in sizes[2 * layers :]] == [
        f"{side}_steps_{i}" for i in range(layers) for side in "kv"
    ]
    row = sizes[0][1]
    assert [size for _, size in sizes] == [row] * 2 * layers + [4] * 2 * layers
    assert layout.bytes_per_token == 2 * layers * (row + 4)
    assert layout.float16_bytes_per_token == 2 * layers * 2 * row


@pytest.mark.slow
def test_in_onnx_runtime_it_has_the_codes_of_the_reference_in_double_precision(tiny_c8, tmp_path):
    checkpoint, program = quantized(tiny_c8("qwen2", "w8a8", "offsets"))
    [row] = double_rows(checkpoint, program, Tokens(TOKENS[:8], TOKENS[8:]))
    assert row.codes is not None
    assert (row.codes.differ, row.greedy) == (0, row.calls)
    with pytest.raises(TargetError) as refused:
        emit(program, checkpoint, tmp_path / "gqa", "gqa")
    assert str(refused.value) == (
        "k_new_0: has a scale a token, and the int8 cache of GroupQueryAttention one a channel; "
        "compile with --flavor standard"
    )


def test_pages_with_a_scale_a_token_are_read_as_codes_times_scales():
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (2, 3, 32, 2 * 32), generator=random).to(torch.int8)
    steps = torch.rand(2, 3, 32, generator=random) + 0.01
    query = torch.randn(2, 1, 4 * 32, generator=random)
    table, lengths = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32), [45, 7]
    paged = {"block_table": table, "block_size": 32, "actual_seq_lengths_kv": lengths}
    named = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.2, **paged}
    found, _ = npu_fused_infer_attention_score(
        query,
        *codes,
        key_antiquant_scale=steps[0],
        value_antiquant_scale=steps[1],
        key_antiquant_mode=4,
        value_antiquant_mode=4,
        **named,
    )
    for b, length in enumerate(lengths):
        k, v = (
            (codes[i].double() * steps[i].double()[..., None])[table[b].long()]
            .flatten(0, 1)[:length]
            .view(length, 2, 32)
            for i in (0, 1)
        )
        q = query[b].double().view(2, 2, 32)
        logits = torch.einsum("hgd,lhd->hgl", q, k) * 0.2
        want = torch.einsum("hgl,lhd->hgd", logits.softmax(-1), v).flatten()
        # A float32 logit is off by (D + 2) roundings of its products' sizes, a weight by as much
        # of itself, and twice that when it is divided; a sum of weighted values by (L + 2) more.
        sizes = torch.einsum("hgd,lhd->hgl", q.abs(), k.abs()).max() * 0.2
        error = (2 * (32 + 2) * sizes + length + 2) * 2.0**-24 * v.abs().max()
        assert (found[b].double().flatten() - want).abs().max() < error


REFUSED = [
    (
        {"key_antiquant_mode": 1},
        "antiquant modes 0, 1, 4 are not emulated; use 0, or 4 for key and value",
    ),
    (
        {"block_table": None},
        "mode 4 is for int8 pages [blocks, block_size, heads * D] and one query row; use mode 0",
    ),
    (
        {"key_antiquant_offset": torch.ones(3, 32)},
        "offsets of tokens are not emulated; leave them out",
    ),
    (
        {"value_antiquant_scale": torch.ones(3, 16)},
        "the scales of tokens are torch.float32[3, 16] for pages [3, 32, 64]; "
        "give torch.float32[3, 32]",
    ),
]


@pytest.mark.parametrize(("changed", "said"), REFUSED)
def test_what_the_op_does_not_take_by_token_is_refused(changed, said):
    codes, steps = torch.zeros(3, 32, 64, dtype=torch.int8), torch.ones(3, 32)
    named = {
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "block_size": 32,
        "actual_seq_lengths_kv": [3],
        "num_heads": 4,
        "num_key_value_heads": 2,
        "key_antiquant_scale": steps,
        "value_antiquant_scale": steps,
        "key_antiquant_mode": 4,
        "value_antiquant_mode": 4,
        **changed,
    }
    with pytest.raises(TargetError) as refused:
        npu_fused_infer_attention_score(torch.zeros(1, 1, 128), codes, codes, **named)
    assert str(refused.value) == f"npu_fused_infer_attention_score: {said}"


@pytest.mark.slow
def test_codes_that_are_read_by_the_scales_of_other_tokens_are_refused(tiny_c8):
    _, program = quantized(tiny_c8("llama"))
    k, v = program.calls(ops.dequantize_tokens)[:2]
    v.update_arg(1, k.args[1])
    with pytest.raises(IRError) as refused:
        verify(program)
    assert str(refused.value) == (
        "dequantize_tokens_1: reads v_new_0 otherwise than quantize_tokens_1 quantized it; "
        "dequantize by the scales of the same tokens"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fold": "kv"}, "fold: is kv with kv_scales_by token, which goes with offsets"),
        ({"kv_format": "nz"}, "kv_format: is nz with kv_scales_by token, which goes with nd"),
        ({"ranks": 2}, "ranks: is 2 with kv_scales_by token, which goes with 1"),
    ],
)
def test_what_a_scale_a_token_does_not_go_with(given, said):
    with pytest.raises(TargetError) as refused:
        Options(kv_scales_by="token", **given)
    assert str(refused.value) == f"{said}; leave one of the two out"


@pytest.mark.slow
def test_an_engine_that_has_scales_of_channels_is_not_computed_by_token(tiny_c8, tmp_path, capsys):
    source = str(tiny_c8("llama"))
    (tmp_path / "t.txt").write_text("one two three four")
    given = [source, "--against", source, "--text", str(tmp_path / "t.txt"), "--windows", "1"]
    given += ["--window", "4", "--kv-scales-by", "token", "--as", "vllm-ascend"]
    assert command.entry(evaluate.parser(), evaluate.work, given) == 1
    assert capsys.readouterr().err.endswith(
        "error: --kv-scales-by token: is not for --as vllm-ascend; leave one of the two out\n"
    )


@pytest.mark.slow
def test_a_cache_whose_channels_are_smoothed_still_is_not_attended_to(tiny_c8):
    _, program = quantized(tiny_c8("llama"))
    fold_kv_scales(program)
    with pytest.raises(IRError) as refused:
        lower_paged_attention(program, phase="decode")
    assert str(refused.value) == (
        "lower_paged_attention: rewrote nothing (attention_0 (model.layers.0.self_attn) left as it "
        "was: its channels were smoothed, which fold_token_smoothing takes out of its cache); "
        "see the reasons"
    )
