"""OpenVINO's decode step of the float model, with its own u8 cache that it keeps between steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvc8.ir.errors import TargetError


class Stateful:
    """A model as `optimum-cli export openvino --task text-generation-with-past` writes it.

    It computes in float32 and quantizes K and V a token and a head, as its default is on a CPU.
    Raises TargetError where openvino is not installed or the directory holds no such model.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        try:
            import openvino
        except ImportError:
            raise TargetError("openvino", "is not installed", "pip install openvino") from None
        path = directory / "openvino_model.xml"
        if not path.is_file():
            do = "export one by optimum-cli export openvino --task text-generation-with-past"
            raise TargetError(directory.name, "holds no openvino_model.xml", do)
        settings = {"KV_CACHE_PRECISION": "u8", "INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().compile_model(
            path, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads}
        )
        self.request = model.create_infer_request()
        self.tensor = openvino.Tensor

    def step(self, token: int, context: int) -> Callable[[], object]:
        """What decodes one token behind a past of random K and V, which grows by it each time."""
        random = np.random.default_rng(0)
        for state in self.request.query_state():
            _, heads, _, dim = state.state.shape
            past = random.standard_normal((1, heads, context - 1, dim), dtype=np.float32)
            state.state = self.tensor(past)
        length = context - 1

        def decode() -> object:
            nonlocal length
            length += 1
            given = {
                "input_ids": np.array([[token]]),
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.array([[length - 1]]),
                "beam_idx": np.zeros(1, np.int32),
            }
            return self.request.infer(given)

        return decode
