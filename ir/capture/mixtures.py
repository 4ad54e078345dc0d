"""What transformers calls for the experts of a mixture, in ops of ours.

transformers packs the experts of a layer: gate_up_proj [E, 2I, H] (or up_proj [E, I, H]) and
down_proj [E, H, I], transposed in some models, and asks a function of its ExpertsInterface for what
they give.
"""

from typing import Any

from torch import Tensor
from torch.nn import Module

from kvc8.ir.mixture_ops import combine, grouped_linear, route


def experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **_: object
) -> Tensor:
    """The experts' sum for each token: hidden_states [T, H], index and weights [T, k] to [T, H].

    `module` is a transformers module decorated with use_experts_implementation.
    """
    rows, places, counts = route(hidden_states, top_k_index, module.num_experts)
    up = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", rows, counts)
    inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    out = _linear(module, "down_proj", inner, counts)
    out = module.post_expert_norm(out) if module.has_post_expert_norm else out
    total: Tensor = combine(out, places, top_k_weights).to(hidden_states.dtype)
    return total


def _linear(module: Module, name: str, rows: Tensor, counts: Tensor) -> Tensor:
    weight = getattr(module, name)
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    made: Tensor = grouped_linear(rows, weight, bias, counts)
    return made
