"""Multi-head latent attention: its latent is what is cached, and nothing else is computed."""

from textwrap import dedent

import pytest
import torch
from support.architectures import others
from support.decoded import off
from support.pass_docs import load
from support.tiny_models import SIZES

import kvc8
from kvc8.backends.onnx.emitter import emit
from kvc8.backends.onnx.model import open_model
from kvc8.backends.runtime.inputs import Rows
from kvc8.backends.runtime.kv_layout import kv_layout
from kvc8.ir.capture import trace
from kvc8.ir.capture.original import open_original
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint, read_files
from kvc8.ir.expression import make
from kvc8.ir.precision.widen import widen
from kvc8.ir.run import run
from kvc8.ir.text import parse, show
from kvc8.passes import pipeline
from kvc8.passes.fold_latent_attention import fold_latent_attention
from kvc8.tools import inspect
from kvc8.tools.driver.faithful import LIMIT
from kvc8.tools.inspector.plan import plan
from kvc8.tools.inspector.seen import look

HEADS, LATENT, ROPE, NOPE, V = 4, 128, 16, 32, 32
KINDS = ("deepseek_v3", "minicpm3")
TEXTS = ([5, 17, 42, 99, 3, 64, 80, 23, 11, 71], [9, 100, 31, 4])


@pytest.fixture(scope="module")
def model(tiny_model):
    """`model(kind)`: the directory, and the program with folded attention, in float32."""
    made = {}

    def model(kind):
        if kind not in made:
            directory = tiny_model(kind, **others(16)[kind], num_hidden_layers=2)
            program = capture(open_checkpoint(directory), torch.float32)
            made[kind] = directory, program, pipeline.run(program, pipeline.QUANTIZE)
        return made[kind]

    return model


def of(remarks, name):
    return [str(remark) for by, remark in remarks if by == name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_its_latent_and_one_rotated_key(kind, model):
    _, program, remarks = model(kind)
    at = [f"model.layers.{i}.self_attn" for i in range(2)]
    row = f"a row of {LATENT} + {ROPE} channels for {HEADS} heads of {NOPE + ROPE} + {V}"
    assert of(remarks, "fold_latent_attention") == [
        f"attention_{i} ({origin}): {row}" for i, origin in enumerate(at, 2)
    ]
    why = "it holds latents, which are small and stay float"
    assert of(remarks, "insert_kv_quant") == [
        f"{name}_new_{i} ({origin}) left as it was: {why}"
        for i, origin in enumerate(at)
        for name in ("latent", "rope")
    ]
    layout = kv_layout(program)
    assert [(c.name, c.heads, c.head_dim) for c in layout.caches] == [
        (f"{name}_cache_{i}", 1, width)
        for i in range(2)
        for name, width in (("latent", LATENT), ("rope", ROPE))
    ]
    assert layout.bytes_per_token == 2 * (LATENT + ROPE) * 4


@pytest.mark.slow
def test_layers_that_are_alike_are_copied_of_those_of_a_shorter_model(tiny_model, monkeypatch):
    """It takes minutes to trace all layers of a large one."""
    directory = tiny_model("deepseek_v3", **others(16)["deepseek_v3"], num_hidden_layers=4)
    whole = show(capture(open_checkpoint(directory), stamped=False))
    monkeypatch.delattr(trace, "_trace_whole")
    assert show(capture(open_checkpoint(directory))) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_transformers_computes(kind, model):
    """Decoding out of its cache; in float64 within LIMIT, which `off` holds it to."""
    directory, program, _ = model(kind)
    assert off(directory, program) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_computes_the_same_in_prefill_chunks_and_decode(kind, model, tmp_path):
    """Two texts of other lengths, so that what is gathered of pages is of both."""
    directory, program, _ = model(kind)
    emit(widen(program), open_checkpoint(directory), tmp_path / "onnx")
    compiled = open_model(tmp_path / "onnx", threads=1)
    compiled.block_size = 4
    compiled.allocate(None, [12, 8])
    tables, ends = [[2, 0, 3], [4, 1]], [len(text) for text in TEXTS]
    parts = [[(0, 4), (0, 2)], [(4, 9), (2, 3)], [(9, 10), (3, 4)]]  # prompts, chunks, decode
    original = open_original(open_checkpoint(directory), torch.float32)
    theirs = [original.run(text)[0] for text in TEXTS]
    for part in parts:
        each = list(zip(TEXTS, part, tables, theirs, strict=True))
        logits = compiled.mixed([Rows(text[a:b], a, table) for text, (a, b), table, _ in each])
        want = torch.stack([full[end - 1] for _, (_, end), _, full in each])
        assert float((logits - want).abs().max()) <= LIMIT * float(want.abs().max())
    assert [end for _, end in parts[-1]] == ends


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_model_without_scales_is_compiled_with_its_latents_as_they_are(dtype, model, tmp_path):
    directory, *_ = model("minicpm3")
    made = kvc8.compile(directory, target="onnx", out=tmp_path / "onnx", dtype=dtype)
    size = {"float16": 2, "float32": 4}[dtype]
    assert made.layout.bytes_per_token == 2 * (LATENT + ROPE) * size
    compiled = open_model(tmp_path / "onnx", threads=1)
    compiled.allocate(None, [11])
    logits = compiled.prefill([TEXTS[0]], [[0]])
    assert logits.isfinite().all()
    assert compiled.decode([7], [11], [[0]]).shape == (1, SIZES["vocab_size"])


@pytest.mark.slow
def test_the_inspector_plans_for_latents(model):
    """In float16, whole on each card; that there are no scales is no finding."""
    directory, *_ = model("minicpm3")
    seen = look(read_files(directory))
    assert seen.refusal is None
    assert [(r.cache, r.cards, r.bytes_per_token) for r in plan(seen).rows] == [
        ("float16", 1, 2 * (LATENT + ROPE) * 2)
    ]
    assert not {"no-c8", "parallel", "replicated"} & {
        finding.kind for finding in inspect.find(seen)
    }


def documented(*changes: tuple[str, str]):
    """The program that the pass documents, in float64, with other texts in places."""
    _, found = load("fold_latent_attention")
    text = dedent(found[2]).replace("f16", "f64")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse(text)


def test_it_differs_by_the_order_of_sums_alone():
    """The most that rounding in float64 can make of it.

    With u = 2**-53 a sum of n products is off by at most n u/(1 - n u) of the sum of their sizes
    (Higham, Accuracy and Stability, 3.1), in whatever order; two sums one in the other add up. So
    both forms have each logit within g = scale*m*u*(|q1||U||c| + |q2||r|) of the true one, where m
    is k + L + R + 4, with the scale and the products themselves. Weights then are within a factor
    of e^(2g), and e^(2g) - 1 <= 4g; a softmax over n keys rounds by n + 4 more, and the sum over
    keys and that by V's weight by n + L: what comes out is within (8g + 2(3n + L + 4) u)|W||c| of
    the other form, where |c| is the largest of each channel.
    """
    program = documented()
    after = program.copy()
    fold_latent_attention(after)
    random = torch.Generator().manual_seed(0)
    made = {
        node.name: torch.randn(
            [{"T": 6}.get(str(d), d) for d in node.meta["type"].shape],
            generator=random,
            dtype=torch.float64,
        )
        for node in program.inputs()[:4]
    }
    weight = torch.randn(112, 32, generator=random, dtype=torch.float64)
    given = {
        **made,
        "slot_mapping": torch.tensor([4, 5, 6, 7, 0, 1], dtype=torch.int32),
        "block_table": torch.tensor([[1, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([6], dtype=torch.int32),
        "query_starts": torch.tensor([0, 6], dtype=torch.int32),
    }
    found = []
    for each in (program, after):
        caches = {
            c.name: torch.zeros(2, 4, *c.meta["type"].shape[2:]).double() for c in each.caches()
        }
        own = {p.name: make(p.meta["expression"], lambda _: weight) for p in each.parameters()}
        found.append(run(each, {**given, **caches, **own})[0])
    unit, scale, tokens = 2.0**-53, 0.2, 6
    by_head = weight.unflatten(0, (HEADS, 28)).abs()
    c, r = made["latent"][0, 0].abs(), made["k_rot"][0, 0].abs()
    keys = torch.einsum("hkl,tl->htk", by_head[:, :16], c)
    sizes = torch.einsum("hqk,htk->hqt", made["q_pass"][0].abs(), keys)
    sizes = sizes + torch.einsum("hqr,tr->hqt", made["q_rot"][0].abs(), r)
    g = scale * (16 + LATENT + ROPE + 4) * unit * sizes.amax(-1)  # [heads, queries]
    values = torch.einsum("hvl,l->hv", by_head[:, 16:], c.amax(0))
    bound = (8 * g + 2 * (3 * tokens + LATENT + 4) * unit)[..., None] * values[:, None]
    gap = (found[0] - found[1]).abs().permute(1, 0, 2)
    assert (gap <= bound).all()
    assert found[0].abs().max() > 1e6 * bound.max()


LINEAR = "linear: f64[1, 1, T, 112] = aten.linear(latent, kv_b_weight)"
BIASED = LINEAR.replace("kv_b_weight)", "kv_b_weight, bias)")
QUERY = "transpose_1: f64[1, T, 4, 24] = aten.transpose.int(cat_1, 1, 2)"
READ = "return [attention_0, k_new_0, v_new_0]"
LEFT = {
    "its K and V are made of the latent by a linear with a bias": [
        (LINEAR, BIASED),
        ('stored("kv_b.weight"),', 'stored("kv_b.weight"),\n    bias: f64[112] = stored("b"),'),
    ],
    "its K and V are not made of one latent by one linear": [
        (LINEAR, LINEAR + "\n    neg: f64[1, 1, T, 112] = aten.neg(linear)"),
        ("aten.reshape(linear", "aten.reshape(neg"),
    ],
    "the checkpoint has scales for K and V of each head": [
        ("12] = cache()", '12] = cache(stored("s"), None, "post-rope")')
    ],
    "something else reads its cache too": [
        (READ, "neg: f64[N, S, 4, 24] = aten.neg(k_new_0)\n    " + READ.replace("[a", "[neg, a"))
    ],
    "its query is not cut where its K is": [
        (QUERY, "neg: f64[1, 4, T, 24] = aten.neg(cat_1)\n    " + QUERY.replace("cat_1", "neg"))
    ],
}


@pytest.mark.parametrize("why", LEFT)
def test_a_site_that_is_none_is_left_alone_and_says_why(why):
    program = documented(*LEFT[why])
    before = show(program)
    assert [str(r) for r in fold_latent_attention(program)] == [
        f"attention_0 left as it was: {why}"
    ]
    assert show(program) == before


def test_an_attention_whose_heads_share_nothing_is_no_site(tiny_model):
    program = capture(open_checkpoint(tiny_model("llama")))
    assert fold_latent_attention(program) == []
