"""The engines that serve what kvc8 writes, by name; `engine_form.py` says what each wants."""

from collections.abc import Mapping
from typing import Literal

Engine = Literal["vllm-ascend", "mindie"]
ENGINES: tuple[Engine, ...] = ("vllm-ascend", "mindie")
NAMES: Mapping[Engine, str] = {"vllm-ascend": "vllm-ascend", "mindie": "MindIE"}
PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one linear in an engine
