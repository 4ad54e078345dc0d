"""The folds of K's and V's scales and offsets: each within its bound, isolated at the first layer.

Both programs run the same prompt in float32. The codes of the first layer's cache do not depend on
a fold, so what its attention and its o_proj give is compared with nothing else between.
"""

from dataclasses import dataclass

import pytest
import torch
from support.onnx_models import captured
from support.pass_docs import load
from support.steps import step, values

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.ir import ops
from kvc8.ir.expression import make
from kvc8.ir.program import Program, argument, is_call
from kvc8.ir.run import run
from kvc8.ir.text import parse, show
from kvc8.passes.fold_k_offset import fold_k_offset
from kvc8.passes.fold_k_scale import fold_k_scale
from kvc8.passes.fold_kv_scales import fold_kv_scales
from kvc8.passes.fold_v_offset import fold_v_offset
from kvc8.passes.fold_v_offset_into_codes import fold_v_offset_into_codes
from kvc8.passes.fold_v_scale import fold_v_scale
from kvc8.passes.matchers.projection import projection
from kvc8.passes.pipeline import QUANTIZE
from kvc8.passes.pipeline import run as run_passes
from kvc8.passes.rewrite import Pass, Remark

KINDS = ("llama", "qwen2", "qwen3", "mistral")
UNIT = 2.0**-24  # one float32 rounding is off by at most this, relative
TOKENS = [5, 9, 17, 33, 65, 12, 101, 7, 44, 3, 25, 18, 90]
TABLE = [[7, 2, 11, 5]]


@dataclass
class Seen:
    """What the first layer computed."""

    q: torch.Tensor  # [T, Hq, D]
    k: torch.Tensor  # [T, H, D], what the cache gave back
    v: torch.Tensor
    scale: float
    out: torch.Tensor  # of the attention, [T, Hq*D]
    y: torch.Tensor  # of o_proj, [T, O]
    made: dict[str, torch.Tensor]  # every value and parameter, by name
    reader: torch.fx.Node  # o_proj, or its quantizer
    q_input: str  # what q_proj takes, or its codes

    @property
    def output_error(self) -> float:
        """How far rounding can take an output of the attention.

        A logit is a sum of D products of a query and a key, which was itself rounded: off by
        (D + 3) units of the sum of their sizes, g. A weight exp(l - max) is off by 2g relative, and
        by L + 4 units for the sum of L of them and the division; the mean of values by those
        weights by that and L units more. One part in 100 covers the terms of second order.
        """
        return (
            1.01 * UNIT * float(self.v.abs().max()) * (2 * self.logit_error + 2 * len(self.k) + 4)
        )

    @property
    def logit_error(self) -> float:
        return (self.q.shape[-1] + 3) * float(self.sizes(self.q.abs()).max())

    def sizes(self, q: torch.Tensor) -> torch.Tensor:
        """The logits of some sizes of queries [T, Hq, D] with the sizes of the keys."""
        keys = self.k.abs().repeat_interleave(q.shape[1] // self.k.shape[1], 1)
        return torch.einsum("thd,lhd->htl", q, keys) * self.scale


def lowering(directory):
    program = captured(directory)
    run_passes(program, QUANTIZE)
    fold_kv_scales(program)
    return program


def first_layer(program, directory) -> Seen:
    made = values(program, directory)
    given = step(TOKENS, [0], [len(TOKENS)], TABLE)
    slots = given["slot_mapping"].long()
    run(program, {**made, **given}, lambda node, value: made.update({node.name: value}))
    attention = program.calls(ops.paged_attention)[0]
    reader, why = projection(attention, argument(argument(attention, 2), 0))
    assert not why
    linear = next(iter(reader.users)) if is_call(reader, ops.quantize) else reader
    q, k, v = (made[argument(attention, i).name] for i in range(3))
    rows = [x.flatten(0, 1)[slots] for x in (k, v)]
    linears = program.calls(ops.quant_linear, torch.ops.aten.linear.default)
    q_input = argument(next(n for n in linears if "layers_0_self_attn_q" in n.args[1].name), 0).name
    out = made[attention.name].flatten(1)
    y = made[linear.name][0]
    return Seen(q, *rows, attention.args[6], out, y, made, reader, q_input)


@pytest.fixture(scope="module")
def both(tiny_c8):
    """`both(model, fold)`: the first layer before a fold and after it, and the remarks."""
    made: dict[tuple[str, ...], tuple[Program, Seen]] = {}

    def both(model: tuple[str, ...], fold: Pass) -> tuple[Seen, Seen, list[Remark]]:
        directory = tiny_c8(*model)
        if model not in made:
            program = lowering(directory)
            made[model] = program, first_layer(program, directory)
        program, before = made[model]
        folded = program.copy()
        remarks = fold(folded)
        return before, first_layer(folded, directory), remarks

    return both


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_dropping_the_offset_of_k_changes_rounding_only(kind, both):
    before, after, remarks = both((kind, "w8a8", "offsets"), fold_k_offset)
    assert [remark.why_not for remark in remarks] == [""] * 2
    assert not torch.equal(before.k, after.k)
    assert (before.out - after.out).abs().max() <= before.output_error + after.output_error


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_float_o_proj_takes_the_offset_of_v_in_its_bias(kind, both):
    before, after, remarks = both((kind, "float", "offsets"), fold_v_offset)
    assert [remark.why_not for remark in remarks] == [""] * 2
    weight = before.made[before.reader.args[1].name].abs()
    bias = after.made[after.reader.args[2].name].abs()
    constant = (before.out - after.out).abs().max()  # what moved into the bias, an output's share
    assert constant > 1
    u_error = before.output_error + after.output_error + 4 * UNIT * constant
    sizes = (before.out.abs() + after.out.abs()) @ weight.T + bias
    bound = u_error * weight.sum(1) + (weight.shape[1] + 2) * UNIT * sizes
    assert ((before.y - after.y).abs() <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_w8a8_o_proj_takes_the_offset_of_v_within_half_a_step(kind, both):
    """Against o_proj of the very values, not of its codes: both are within half a step of that."""
    before, after, remarks = both((kind, "w8a8", "offsets"), fold_v_offset_into_codes)
    assert [remark.why_not for remark in remarks] == [""] * 2
    scale, zero = (before.made[node.name].double() for node in before.reader.args[1:])
    linear = next(iter(before.reader.users))
    w, deq, bias = (before.made[node.name].double() for node in linear.args[1:4])
    exact = before.out.double() / scale + zero
    clipped = (exact - exact.clamp(-128, 127)).abs()
    u_error = before.output_error + after.output_error + 4 * UNIT * after.out.abs().max()
    steps = 0.5 + clipped + u_error / scale + 4 * UNIT * after.out.abs() / scale
    want = (exact @ w.T + bias) * deq
    bound = (steps @ w.abs().T + 0.5 + 4 * UNIT * want.abs() / deq) * deq
    for seen in (before, after):
        assert ((seen.y.double() - want).abs() <= bound).all()
    n = after.made[after.reader.args[2].name] - zero
    assert n.unique().numel() > 1, "one zero point for all channels would not be a test"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["symmetric", "offsets"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_w8a8_o_proj_takes_the_scale_of_v_in_its_quantizer(kind, variant, both):
    before, after, remarks = both((kind, "w8a8", variant), fold_v_scale)
    assert [remark.why_not for remark in remarks] == [""] * 2
    scale, zero = (before.made[node.name].double() for node in before.reader.args[1:])
    each = after.made[after.reader.args[1].name].double()
    u_error = before.output_error / scale + after.output_error / each
    exact = before.out.double() / scale + zero
    # three roundings on either side: the quotient of scales, that by it, and the sum
    close = u_error + 6 * UNIT * (exact.abs() + 2 * zero.abs())
    codes = [seen.made[seen.reader.name][0].int() for seen in (before, after)]
    to_middle = (exact - exact.floor() - 0.5).abs()
    differ = codes[0] != codes[1]
    assert (to_middle[differ] <= close.expand_as(to_middle)[differ]).all()
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert after.v.abs().max() <= 255


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["symmetric", "offsets"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_float_o_proj_takes_the_scale_of_v_in_its_columns(kind, variant, both):
    before, after, remarks = both((kind, "float", variant), fold_v_scale)
    assert [remark.why_not for remark in remarks] == [""] * 2
    weight, scaled = (seen.made[seen.reader.args[1].name].abs() for seen in (before, after))
    bound = before.output_error * weight.sum(1) + after.output_error * scaled.sum(1)
    bound = bound + 2 * (weight.shape[1] + 3) * UNIT * (before.out.abs() @ weight.T)
    assert ((before.y - after.y).abs() <= bound).all()


ROUTES = {
    ("llama", "w8a8", "pre-rope"): "q_proj's deq_scale",
    ("qwen2", "w8a8", "pre-rope"): "q_proj's deq_scale",
    ("mistral", "w8a8", "pre-rope"): "q_proj's deq_scale",
    ("llama", "float", "pre-rope"): "q_proj's weight",
    ("qwen2", "float", "pre-rope"): "q_proj's weight",  # with a bias
    ("llama", "w8a8", "symmetric"): "the query, by a multiplication",
    ("qwen3", "w8a8", "offsets"): "the query, by a multiplication",
    ("mistral", "float", "offsets"): "the query, by a multiplication",
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "route"), ROUTES.items(), ids=map("-".join, ROUTES))
def test_the_query_takes_the_scale_of_k(model, route, both):
    """The query's own error, in both programs, beside that of the attention.

    q_proj's sums differ by K units of the sizes of their products (none in W8A8, which is exact);
    RoPE adds two products of a pair's channels, each with three roundings a side, whose sizes sum
    to at most twice the pair's larger result, for a rotation keeps its length.
    """
    before, after, remarks = both(model, fold_k_scale)
    assert [remark.note for remark in remarks] == [f"into {route}"] * 2
    assert not torch.equal(before.k, after.k)
    q_error = 18 * UNIT * before.q.abs().amax(2, keepdim=True)
    if model[1] == "float":
        w = before.made["model_layers_0_self_attn_q_proj_weight"].abs()
        sizes = (before.made[before.q_input][0].abs() @ w.T).unflatten(1, before.q.shape[1:])
        q_error = q_error + 4 * (w.shape[1] + 4) * UNIT * sizes.amax(2, keepdim=True)
    extra = before.sizes(q_error.expand_as(before.q)).max() * before.v.abs().max() * 2.02
    bound = before.output_error + after.output_error + extra
    assert (before.out - after.out).abs().max() <= bound
    assert after.q.abs().max() <= before.q.abs().max() * 1.5, "the power of two keeps q small"


ALONE = "0.5, 0, 0.0, None"
LEFT = [
    (
        "fold_k_offset",
        ALONE,
        "0.5, 0, 30.0, None",
        "a soft cap lies between its logits and the softmax",
    ),
    ("fold_k_offset", ALONE, "0.5, 0, 0.0, ds", "a sink beside its logits carries no offset"),
    ("fold_k_offset", "offset=do", "offset=None", "its K has no offset"),
    (
        "fold_k_offset",
        "return [attention_0]",
        "return [attention_0, wide]",
        "its dequantized K is read elsewhere",
    ),
    ("fold_k_offset", "(q, k, v,", "(q, k, k,", "its K is read by more than attention"),
    ("fold_v_offset", ALONE, "0.5, 0, 0.0, ds", "a sink takes part of what its weights sum to"),
    (
        "fold_v_offset",
        "return [linear]",
        "return [linear, reshape]",
        "more than one linear reads it",
    ),
    (
        "fold_v_offset",
        "return [linear]",
        "return [linear, v]",
        "its dequantized V is read elsewhere",
    ),
    ("fold_v_offset", "offset=do", "offset=None", "its V has no offset"),
    (
        "fold_v_offset",
        "aten.linear(reshape, o_weight)",
        "aten.matmul(reshape, aten_t)",
        "matmul reads it, which is no linear",
    ),
    (
        "fold_v_offset_into_codes",
        ALONE,
        "0.5, 0, 0.0, ds",
        "a sink takes part of what its weights sum to",
    ),
    (
        "fold_v_scale",
        "return [linear]",
        "return [linear, attention_0]",
        "more than one linear reads it",
    ),
    (
        "fold_k_scale",
        "return [attention_0]",
        "return [attention_0, k]",
        "its dequantized K is read elsewhere",
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "why"), LEFT)
def test_a_site_left_alone_says_why(name, old, new, why):
    step_, found = load(name)
    text = found[2].replace(old, new)
    if "aten_t" in new:
        text = text.replace("linear: f16[1, T, 96]", "matmul: f16[1, T, 96]")
        text = text.replace("o_weight: f16[96, 128]", "aten_t: f16[128, 96]").replace(
            "[linear]", "[matmul]"
        )
    program = parse(text)
    assert show(program) != show(parse(found[2]))
    program.drop_unused_parameters()
    before = show(program)
    assert [remark.why_not for remark in step_(program)] == [why]
    program.drop_unused_parameters()
    assert show(program) == before


def test_each_kind_of_o_proj_is_for_its_own_pass():
    for name, other, why in (
        (
            "fold_v_offset",
            "fold_v_offset_into_codes",
            "o_proj is W8A8; --fold kv folds it into the codes' zero points",
        ),
        ("fold_v_offset_into_codes", "fold_v_offset", "o_proj is float; its bias takes the offset"),
    ):
        step_, _ = load(name)
        _, found = load(other)
        assert [remark.why_not for remark in step_(parse(found[2]))] == [why]


def test_a_float_weight_that_another_phase_uses_stays():
    _, found = load("fold_v_offset")
    [remark] = fold_v_scale(parse(found[2]), weights=False)
    assert remark.why_not == "o_proj is float and another phase uses its weight as it is"


def test_whole_offsets_fold_into_codes_exactly():
    """Where o*s/s_in is whole, and powers of two round nothing, all bits stay what they were."""
    step_, found = load("fold_v_offset_into_codes")
    program = parse(found[2].replace("f16", "f32").replace("dst_dtype=5", "dst_dtype=6"))
    folded = program.copy()
    step_(folded)
    random = torch.Generator().manual_seed(1)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    stored = {
        "s": torch.full((64,), 0.25),
        "z": integers(-99, 100, 64).float(),  # with codes of up to 8, nothing clips
        "is": torch.tensor([0.25]),
        "iz": torch.tensor([-3.0]),
        "o.weight": integers(-128, 128, 96, 128).to(torch.int8),
        "ds": torch.rand(96, generator=random),
        "qb": integers(-999, 999, 96).int(),
    }
    given = {
        "x": torch.zeros(1, 4, 32),  # every key weighs the same: a quarter each, exactly
        "k": torch.zeros(1, 4, 2, 32),
        "v_new_0": integers(-8, 8, 1, 4, 2, 32).to(torch.int8),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "seq_lens": torch.tensor([4], dtype=torch.int32),
        "query_starts": torch.tensor([0, 1], dtype=torch.int32),
    }
    results = []
    for p in (program, folded):
        parameters = {
            n.name: make(n.meta["expression"], stored.__getitem__) for n in p.parameters()
        }
        results.append(run(p, {**parameters, **given})[0])
    assert torch.equal(*results)
    assert results[0].unique().numel() > 90
