"""Norms balanced against their linears: the same model, and channels that int8 holds."""

import pytest
import torch

from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.tools.quantizer.sites import choose, sites
from kvc8.tools.quantizer.transforms import balancing
from kvc8.tools.quantizer.transforms.roles import Norm


@pytest.mark.slow
def test_norms_whose_output_is_read_by_chosen_linears_alone(tiny_model):
    checkpoint = open_checkpoint(tiny_model("gemma3", tied=True))
    program = capture(checkpoint, torch.float32)
    found = sites(program)
    norms = balancing.norms(program, choose(found, [], down_proj=True), checkpoint.read)
    ends = ("input_layernorm", "pre_feedforward_layernorm")
    names = {f"model.layers.{i}.{end}.weight" for i in range(4) for end in ends}
    assert balancing.names(norms) == names
    assert {norm.plus for norm in norms.values()} == {1.0}
    without = choose(found, ["*.q_proj"], down_proj=True)
    left = balancing.names(balancing.norms(program, without, checkpoint.read))
    assert left == {name for name in names if "pre_feedforward" in name}


def test_a_norm_that_was_folded_is_left(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    program = capture(checkpoint, torch.float32)
    chosen = choose(sites(program), [], down_proj=True)
    norms = balancing.norms(program, chosen, checkpoint.read)
    assert Norm("model.layers.0.input_layernorm.weight", 0.0) in norms.values()
    ones = balancing.norms(program, chosen, lambda name: torch.ones_like(checkpoint.read(name)))
    assert ones == {}


def test_a_balanced_pair_gives_what_it_gave_and_loses_less():
    random = torch.Generator().manual_seed(0)
    stored = (torch.rand(64, generator=random) * 2).to(torch.bfloat16)
    stored[3], stored[7] = 80.0, -1.0  # one that stands out, and one that is switched off
    normed = torch.randn(200, 64, generator=random)
    x = normed * (stored.float() + 1)
    weights = [torch.randn(size, 64, generator=random) / 8 for size in (32, 16)]
    new, s = balancing.balance(stored, 1.0, x.abs().amax(0), x, weights)
    assert (new.dtype, new[7], s[7]) == (torch.bfloat16, -1, 1)
    for weight in weights:
        want = (normed.double() * (stored.double() + 1)) @ weight.double().t()
        got = (normed.double() * (new.double() + 1)) @ (weight * s).double().t()
        # s, and the weight times s, are rounded to float32: a unit each of each product
        sizes = (normed.double() * (stored.double() + 1)).abs() @ weight.double().abs().t()
        assert ((got - want).abs() <= 3 * 2.0**-24 * sizes).all()
    wanted = [x @ weight.t() for weight in weights]
    plain = balancing._error(x, weights, wanted, torch.ones(64))
    assert balancing._error(x, weights, wanted, s) < plain / 4
