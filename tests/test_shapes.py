"""Shape inference: sizes stay free."""

import pytest
import torch

from kvc8.ir.errors import IRError
from kvc8.ir.shapes import Shapes
from kvc8.ir.types import IntType, TensorType, size

T, S = size("T"), size("S")
ROWS = TensorType(torch.float32, (T, 4))


@pytest.fixture
def library():
    with torch.library._scoped_library("kvc8test", "FRAGMENT") as made:
        yield made


def test_a_rule_that_looks_at_a_size_is_refused(library):
    library.define("nosy(Tensor x) -> Tensor")
    library.impl("nosy", lambda x: x.new_empty(int(x.shape[0]), 2), "Meta")
    with pytest.raises(IRError) as error:
        Shapes().infer(torch.ops.kvc8test.nosy.default, (ROWS,), {})
    assert str(error.value) == (
        "kvc8test.nosy.default: its shape rule takes the size T for 11; write the rule for any size"
    )


def test_a_size_given_for_a_plain_int_stays_free(library):
    library.define("blocks(Tensor x, int block_size, *, int more=1) -> Tensor")
    library.impl("blocks", lambda x, block_size, more=1: torch.empty_like(x), "Meta")
    shapes, op = Shapes(), torch.ops.kvc8test.blocks.default
    assert shapes.infer(op, (ROWS, IntType(S)), {"more": IntType(S)}) == ROWS
    pages = TensorType(torch.float32, (S, T))
    assert shapes.infer(torch.ops.aten.t.default, (pages,), {}) == TensorType(torch.float32, (T, S))
