"""Where transformers' own model is asked, and what is held of it in memory."""

import pytest
import torch
from support.capture_faults import norm_epsilon

from kvc8.ir.capture.original import copied_bytes, open_original
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.errors import ModelError, TargetError
from kvc8.tools.driver.faithful import check_capture
from kvc8.tools.quantizer.float_check import check_float_model
from kvc8.tools.quantizer.layers import stages
from kvc8.tools.verifier.compare import LeftOut, compare_or_leave_out
from kvc8.tools.verifier.forms import Run, Tokens

TOKENS = [5, 17, 42, 99, 3, 64, 80, 23, 11, 71, 9, 100]


def test_no_weights_are_held_while_nothing_runs(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama", num_hidden_layers=2))
    original = open_original(checkpoint, torch.float32)
    before, _ = original.run(TOKENS)
    assert {parameter.device.type for parameter in original.model.parameters()} == {"meta"}
    after, _ = original.run(TOKENS)
    assert torch.equal(before, after)
    assert copied_bytes(checkpoint) == 0


def test_experts_are_put_together_in_memory_of_their_own(tiny_model):
    checkpoint = open_checkpoint(tiny_model("qwen3_moe"))
    experts = [t for name, t in checkpoint.tensors.items() if ".experts." in name]
    assert copied_bytes(checkpoint) == sum(tensor.nbytes for tensor in experts)


@pytest.mark.slow
def test_what_is_to_be_quantized_or_compiled_is_asked_first(tiny_model):
    """A vocabulary so wide that tables are held by rows, and mapped where they are stored."""
    checkpoint = open_checkpoint(tiny_model("llama", num_hidden_layers=2, vocab_size=5000))
    program = capture(checkpoint, torch.float32)
    cut = stages(program)
    check_capture(checkpoint, program)
    said = list[str]()
    check_float_model(checkpoint, program, cut, [TOKENS], None, said.append)
    assert said == []
    check_float_model(checkpoint, program, cut, [TOKENS], 1e6, said.append)
    [note] = said
    assert "is not compared with transformers' own model, which takes" in note
    norm_epsilon(program)
    for asks in (
        lambda: check_float_model(checkpoint, program, cut, [TOKENS], None, said.append),
        lambda: check_capture(checkpoint, program),
    ):
        with pytest.raises(ModelError) as refused:
            asks()
        assert "first in model.layers.1.input_layernorm; do not" in str(refused.value)


def test_a_form_that_cannot_be_made_is_left_out():
    def make() -> Run:
        raise TargetError("floor", "onnx has no lowering for aten.floor", "add one")

    left = compare_or_leave_out("onnx", make, "base", Run(), Tokens([1], []))
    assert left == LeftOut("onnx", "floor: onnx has no lowering for aten.floor; add one")
