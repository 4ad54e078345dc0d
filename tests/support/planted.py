"""Ten faults, each planted in one layer of what a pass gives, as a pass of the same name.

A fault is a function of the program that the sound pass has just made.
"""

from collections.abc import Callable, Iterator
from functools import partial
from operator import getitem

import torch
from torch.fx import Node

from kvc8.ir import npu
from kvc8.ir.expression import Expression, values
from kvc8.ir.program import Program, argument, expression_of, is_call, tensor_type
from kvc8.passes.rewrite import Pass, Remark, Step, pass_of

LAYER = "model.layers.1."
Fault = Callable[[Program], None]


def plant(step: Step, fault: Fault) -> Step:
    """The pass, and the fault after it."""
    sound = pass_of(step)

    def body(program: Program, **options: object) -> Iterator[Remark]:
        yield from list(sound.body(program, **options))
        program.graph.eliminate_dead_code()
        fault(program)

    body.__name__ = sound.name
    broken = Pass(body, sound.takes, sound.gives, sound.contract, sound.required, sound.bound)
    return partial(broken, **step.keywords) if isinstance(step, partial) else broken


def here(program: Program, *ops: object, within: str = "") -> list[Node]:
    """The calls of ops in layer 1, or in a module of it."""
    return [n for n in program.calls(*ops) if n.meta["origin"].startswith(LAYER + within)]


def wrong_sign_of_an_offset(program: Program) -> None:
    [node] = [n for n in program.parameters() if n.name == "v_dequant_offset_1"]
    cast, (negated, dtype) = expression_of(node).op, expression_of(node).args
    assert (cast, negated.op) == ("cast", "neg")
    node.meta["expression"] = Expression("cast", (negated.args[0], dtype))


def scale_of_v_for_k(program: Program) -> None:
    k, v = here(program, npu.npu_anti_quant)
    k_scale, v_scale = argument(k, 1), argument(v, 1)
    k.update_arg(1, v_scale)
    v.update_arg(1, k_scale)


def one_heads_scale_shifted(program: Program) -> None:
    [node] = [
        n
        for n in program.parameters()
        if n.name.endswith("layers_1_self_attn_q_proj_deq_scale_with_k")
    ]
    deq, factor = expression_of(node).args
    width = int(tensor_type(node).shape[0])
    parts = Expression("slice", (factor, 0, 32, width)), Expression("slice", (factor, 0, 0, 32))
    node.meta["expression"] = Expression("mul", (deq, Expression("concat", (parts, 0))))


def slot_off_by_one(program: Program) -> None:
    [write] = here(program, npu.npu_scatter_pa_kv_cache_functional)
    write.update_arg(4, program.call(write, torch.ops.aten.add.Tensor, argument(write, 4), 1))


def dropped_bias(program: Program) -> None:
    linear = here(program, torch.ops.kvc8.quant_linear.default, within="self_attn")[0]
    assert linear.args[3] is not None
    linear.update_arg(3, None)


def unpaired_rope_scale(program: Program) -> None:
    """The key's scale as it was measured before RoPE, where both channels of a pair need one."""
    for name in ("deq_scale_with_k", "k_dequant_scale_1_power"):
        nodes = [n for n in program.parameters() if n.name.endswith(name)]
        node = next(n for n in nodes if "layers_1_" in n.name or n.name == name)
        node.meta["expression"] = _unpaired(expression_of(node))


def _unpaired(expression: Expression) -> Expression:
    if expression.op == "rope_bound":
        assert isinstance(expression.args[0], Expression)
        return expression.args[0]
    args = tuple(_unpaired(a) if isinstance(a, Expression) else a for a in expression.args)
    return Expression(expression.op, args)


def stale_dtype(program: Program) -> None:
    linear = here(program, npu.npu_quant_matmul)[0]
    linear.kwargs = {**linear.kwargs, "output_dtype": 15}


def missing_mask(program: Program) -> None:
    [attention] = here(program, npu.npu_fused_infer_attention_score)
    attention.kwargs = {**attention.kwargs, "sparse_mode": 0, "atten_mask": None}


def swapped_gate_and_up(program: Program) -> None:
    items = [n for n in here(program, getitem) if ".mlp" in n.meta["origin"]]
    gate, up = items[0], items[1]
    gate.update_arg(1, 1)
    up.update_arg(1, 0)


def truncating_quantizer(program: Program) -> None:
    """Codes rounded down: half a step is taken off before they are rounded to nearest."""
    quantize = here(program, npu.npu_quantize)[0]
    x, scale = argument(quantize, 0), argument(quantize, 1)
    half = Expression("mul", (expression_of(scale), values(torch.tensor([0.5]))))
    step = program.placeholder(f"{scale.name}_half", tensor_type(scale), half)
    quantize.update_arg(0, program.call(quantize, torch.ops.aten.sub.Tensor, x, step))
    assert is_call(quantize, npu.npu_quantize)
