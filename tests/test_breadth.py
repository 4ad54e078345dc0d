"""Every architecture that kvc8 captures computes what transformers computes.

A prompt and then tokens one by one out of the cache, through windows that are shorter than the
text: in float64 within the bound of tools/driver/faithful.py, and in float32 within 1e-5.
"""

import pytest
import torch
from support.architectures import WINDOW, captured, sizes
from support.decoded import off

from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint

HEAD = 8
MODELS = captured(HEAD)
WINDOWED = {name for name, config in MODELS.items() if "sliding_window" in config}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_transformers_computes(name, tiny_model):
    config = dict(MODELS[name])
    directory = tiny_model(config.pop("model_type", name), **{**sizes(HEAD), **config})
    program = capture(open_checkpoint(directory), torch.float32)
    windows = {call.args[7] for call in program.calls(ops.paged_attention)}
    assert (WINDOW in windows) == (name in WINDOWED)
    assert off(directory, program) < 1e-5
