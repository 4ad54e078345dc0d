"""Writes to parts of tensors become values, and a model computes what it did."""

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload

from kvc8.ir.capture.functional import functional


def halves(x: Tensor) -> Tensor:
    """As DeepSeek V3 makes K."""
    made = x.new_empty(x.shape[0], 4)
    made[..., :2] = x[..., 2:]
    made[..., 2:] = x[..., :1]  # broadcast
    return made * 2


def read_between(x: Tensor) -> tuple[Tensor, Tensor]:
    made = x.new_empty(x.shape[0], 4)
    made[..., :] = x
    before = made + 1
    made[..., 1:3] = -x[..., :2]
    return before, made + 1


def written_twice(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 4)
    made[..., :3] = x[..., 1:]
    made[..., 2:] = x[..., 2:]
    return made[..., 1:] + x[..., :3]


def seen_before(x: Tensor) -> Tensor:
    """A view that was taken before a write sees it too."""
    made = x.new_empty(x.shape[0], 4)
    whole = made.view(-1, 2, 2)
    made[..., :2] = x[..., 2:]
    made[..., 2:] = x[..., :2]
    return whole.flatten(1) + x


def read_itself(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 4)
    part = made[..., :2]
    part.copy_(x[..., 2:])
    made[..., 2:] = x[..., :2]
    return torch.cat([part, part], 1) + made


def of_what_was_given(x: Tensor) -> Tensor:
    made = x + 1
    made[..., 1:] = x[..., :3]
    return made


def within_a_part(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 4)
    made[..., :] = x
    made[..., :2][..., 1:] = x[..., 3:]
    return made + 1


def by_another_op(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 4)
    made[..., :] = x
    made[..., 1:].mul_(3)
    return made + 1


@pytest.mark.parametrize("direct", [halves, written_twice])
def test_a_new_tensor_that_is_written_in_slices_is_not_traced_again(direct, monkeypatch):
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    assert_the_same(direct)


@pytest.mark.parametrize(
    "torchs",
    [read_between, seen_before, read_itself, of_what_was_given, within_a_part, by_another_op],
)
def test_any_other_write_is_as_torch_makes_it(torchs):
    assert_the_same(torchs)


def assert_the_same(forward):
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> object:
            return forward(x)

    rows = {0: torch.export.Dim.DYNAMIC}
    example = (torch.arange(20.0).view(5, 4),)
    exported = torch.export.export(Model(), example, dynamic_shapes=(rows,), strict=False)
    made = functional(exported)
    targets = [node.target for node in made.graph.nodes if isinstance(node.target, OpOverload)]
    assert [target for target in targets if target._schema.is_mutable] == []
    made.graph_module.recompile()
    x = torch.randn(3, 4)
    assert_equal(made.graph_module(x), forward(x))


def assert_equal(got, want):
    want = want if isinstance(want, tuple) else (want,)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
