"""`verify` passes over calls that it found right only while nothing of them is another."""

import pytest
import torch

from kvc8.ir.errors import IRError
from kvc8.ir.program import Program, Stage
from kvc8.ir.text import parse
from kvc8.ir.types import TensorType
from kvc8.ir.verify import verify

TEXT = """
def quantized(x: i8[4, 8], y: f32[8], scale: f32[8] = stored("s"), zero: f32[8] = stored("z")):
    wide: f32[4, 8] = kvc8.dequantize(x, scale, zero, f32)
    more: f32[4, 8] = aten.add.Tensor(wide, y)
    return [more]
"""


@pytest.fixture
def right() -> Program:
    """A program that verify has passed, so that it knows all of its calls."""
    program = parse(TEXT)
    verify(program)
    assert [*program.unverified()] == []
    return program


OPS = (torch.ops.kvc8.dequantize.default, torch.ops.aten.add.Tensor)


def refused(program: Program) -> str:
    with pytest.raises(IRError) as caught:
        verify(program)
    return str(caught.value)


def test_another_type_of_an_argument(right):
    _, y = right.inputs()
    y.meta["type"] = TensorType(torch.float64, (8,))
    assert refused(right) == (
        "more: marked f32[4, 8] but is f64[4, 8]; the pass that changed its arguments must set it "
        "again"
    )


def test_another_type_of_its_own(right):
    right.calls(OPS[1])[0].meta["type"] = TensorType(torch.float32, (4, 9))
    assert refused(right) == (
        "more: marked f32[4, 9] but is f32[4, 8]; the pass that changed its arguments must set it "
        "again"
    )


def test_another_constant(right):
    wide, scale, zero, _ = right.calls(OPS[0])[0].args[:4]
    right.calls(OPS[0])[0].args = (wide, scale, zero, torch.float16)
    assert refused(right) == (
        "wide: marked f32[4, 8] but is f16[4, 8]; the pass that changed its arguments must set it "
        "again"
    )


def test_another_op(right):
    right.calls(OPS[1])[0].target = torch.ops.aten.gt.Tensor
    assert refused(right) == (
        "more: marked f32[4, 8] but is b8[4, 8]; the pass that changed its arguments must set it "
        "again"
    )


def test_another_stage(right):
    right.stage = Stage.CAPTURED
    assert refused(right) == (
        "wide: kvc8.dequantize.default has no place in a captured program; run the pass that "
        "replaces it"
    )


def test_a_copy_is_checked_on_its_own(right):
    twin = right.copy()
    assert [*twin.unverified()] == twin.calls(*OPS)
    verify(twin)
    assert [*twin.unverified()] == []


def test_what_was_not_looked_at_behind_a_refusal_is_looked_at_again(right):
    """Another type of what both take is found at the first, and at the second once that is gone."""
    scale = right.parameters()[0]
    [wide], [more] = ([node] for node in right.calls(*OPS))
    late = right.call(more.next, OPS[0], *wide.args, name="late")
    verify(right)
    scale.meta["type"] = TensorType(torch.float32, (4, 8, 1))
    assert refused(right).startswith("wide: ")
    wide.args = (wide.args[0], *wide.args[2:3], *wide.args[2:])
    assert refused(right).startswith("late: ")
    assert late.name == "late"


def test_what_the_lint_of_fx_asks_for(right):
    [wide], [more] = ([node] for node in right.calls(*OPS))
    other = parse(TEXT)
    more.append(wide)
    assert refused(right) == "more: takes wide, which comes after it; move the call"
    more.prepend(wide)
    verify(right)
    more.args = (other.calls(OPS[0])[0], more.args[1])
    assert refused(right) == "more: takes wide, which is of another graph; move the call"
    more.args = (wide, right.inputs()[1])
    more.name = "wide"
    assert refused(right) == "wide: is the name of two nodes; name one of them otherwise"


def test_a_write_is_checked_each_time():
    """For who reads what it writes is not in the call."""
    text = """
    def lowered(x: f32[4], k_cache_0: f32[4] = cache()):
        new: f32[4] = aten.new_empty.default(k_cache_0, [4])
        put: f32[4] = aten.copy_.default(new, x)
        return [put, k_cache_0]
    """
    program = parse(text)
    verify(program)
    [new] = program.calls(torch.ops.aten.new_empty.default)
    [put] = program.calls(torch.ops.aten.copy_.default)
    assert [*program.unverified()] == [put]
    program.call(put, torch.ops.aten.neg.default, new)
    assert refused(program) == ("put: aten.copy_.default writes to new; use its functional form")
