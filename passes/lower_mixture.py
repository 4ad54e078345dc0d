"""Compute a mixture of experts by npu_moe_init_routing_v2, npu_grouped_matmul and the weighted sum.

Rows that a quantizer of tokens alone reads are quantized as they are routed, in one launch. Biases
of experts are gathered for each row and added.

before:
    def lowering(
        x: f16[T, 64],
        experts: i64[T, 2],
        weights: f16[T, 2],
        w: i8[4, 32, 64] = stacked("e.*.w", 4),
        ws: f32[4, 32] = reshape(cast(stacked("e.*.ws", 4), f32), [4, 32]),
        back: f16[4, 64, 32] = stacked("e.*.b", 4),
    ):
        route: (f16[2*T, 64], i32[2*T], i64[4]) = kvc8.route(x, experts, 4)
        getitem: f16[2*T, 64] = route[0]
        getitem_1: i32[2*T] = route[1]
        getitem_2: i64[4] = route[2]
        quantize_tokens: (i8[2*T, 64], f32[2*T]) = kvc8.quantize_tokens(getitem)
        getitem_3: i8[2*T, 64] = quantize_tokens[0]
        getitem_4: f32[2*T] = quantize_tokens[1]
        up: f16[2*T, 32] = kvc8.dynamic_grouped_linear(getitem_3, getitem_4, w, ws, getitem_2, f16)
        down: f16[2*T, 64] = kvc8.grouped_linear(up, back, None, getitem_2)
        combine: f16[T, 64] = kvc8.combine(down, getitem_1, weights)
        return [combine]

after:
    def lowering(
        x: f16[T, 64],
        experts: i64[T, 2],
        weights: f16[T, 2],
        ws: f32[4, 32] = reshape(cast(stacked("e.*.ws", 4), f32), [4, 32]),
        w_t: i8[4, 64, 32] = transpose(stacked("e.*.w", 4), 1, 2),
        back_t: f16[4, 32, 64] = transpose(stacked("e.*.b", 4), 1, 2),
    ):
        to: i32[T, 2] = aten.to.dtype(experts, i32)
        npu_moe_init_routing_v2: (i8[2*T, 64], i32[2*T], i64[4], f32[2*T]) = npu.npu_moe_init_routing_v2(x, to, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=1, active_expert_range=[0, 4])
        getitem_5: i8[2*T, 64] = npu_moe_init_routing_v2[0]
        getitem_6: i32[2*T] = npu_moe_init_routing_v2[1]
        getitem_7: i64[4] = npu_moe_init_routing_v2[2]
        getitem_8: f32[2*T] = npu_moe_init_routing_v2[3]
        npu_grouped_matmul: (f16[2*T, 32]) = npu.npu_grouped_matmul([getitem_5], [w_t], scale=[ws], per_token_scale=[getitem_8], output_dtype=5, group_list=getitem_7, split_item=2, group_type=0, group_list_type=1)
        getitem_11: f16[2*T, 32] = npu_grouped_matmul[0]
        npu_grouped_matmul_1: (f16[2*T, 64]) = npu.npu_grouped_matmul([getitem_11], [back_t], group_list=getitem_7, split_item=2, group_type=0, group_list_type=1)
        getitem_12: f16[2*T, 64] = npu_grouped_matmul_1[0]
        npu_moe_token_unpermute: f16[T, 64] = npu.npu_moe_token_unpermute(getitem_12, getitem_6, weights)
        return [npu_moe_token_unpermute]

Bound: a bfloat16 result takes the weight's scale in bfloat16, whose 8 bits put it off by at most
2**-9 of itself, and the result by as much. All else is the same in real numbers.
"""

from collections.abc import Callable, Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir import mixture_ops, npu, ops
from kvc8.ir.expression import Expression, cast
from kvc8.ir.program import Program, Stage, argument, expression_of, is_call, tensor_type
from kvc8.ir.types import TensorType
from kvc8.passes.matchers.token_codes import dynamic_codes
from kvc8.passes.rewrite import Remark, hit, rewrite

TO, RESHAPE = torch.ops.aten.to.dtype, torch.ops.aten.reshape.default
GROUPED = {"split_item": 2, "group_type": 0, "group_list_type": 1}  # counts of rows; one result


def bound(old: Node, new: Node, look: Callable[[Node], Tensor]) -> Tensor:
    """How far a result may be from what it was: see the module."""
    rounded = is_call(old, mixture_ops.dynamic_grouped_linear)
    cut = rounded and tensor_type(old).dtype is torch.bfloat16
    return look(old).abs() * 2.0**-9 if cut else torch.zeros(())


@rewrite(takes=Stage.LOWERING, gives=Stage.LOWERING, contract="quantizing", bound=bound)
def lower_mixture(program: Program) -> Iterator[Remark]:
    """See the module."""
    for route in program.calls(mixture_ops.route):
        _routing(program, route)
    for quantize in program.calls(ops.quantize_tokens):
        _replace_items(quantize, dynamic_codes(program, quantize))
    owners: dict[Node, Node] = {}
    for linear in program.calls(mixture_ops.grouped_linear, mixture_ops.dynamic_grouped_linear):
        new = _matmul(program, linear)
        if is_call(linear, mixture_ops.grouped_linear) and isinstance(linear.args[2], Node):
            new = _biased(program, linear, new, owners)
        linear.replace_all_uses_with(new)
        yield hit(new)
    for combine in program.calls(mixture_ops.combine):
        args = (argument(combine, 0), argument(combine, 1), argument(combine, 2))
        new = program.call(combine, npu.npu_moe_token_unpermute, *args)
        combine.replace_all_uses_with(new)
        yield hit(new)


def _routing(program: Program, route: Node) -> None:
    x, experts, count = route.args
    quantize = _alone(route)
    options: dict[str, Argument] = {
        "expert_num": count,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "quant_mode": -1 if quantize is None else 1,
        "active_expert_range": [0, count],
    }
    assert isinstance(experts, Node)
    args = (x, _in_int32(program, route, experts))
    new = program.call(route, npu.npu_moe_init_routing_v2, *args, kwargs=options)
    rows, places, counts, scale = (program.call(route, getitem, new, i) for i in range(4))
    if quantize is not None:
        _replace_items(quantize, (rows, scale))
    _replace_items(route, (rows, places, counts))


def _alone(route: Node) -> Node | None:
    """The quantizer of tokens that is all that reads the rows."""
    readers = [user for item in route.users if item.args[1] == 0 for user in item.users]
    return readers[0] if len(readers) == 1 and is_call(readers[0], ops.quantize_tokens) else None


def _replace_items(node: Node, items: tuple[Node, ...]) -> None:
    for item in list(node.users):
        index = item.args[1]
        assert isinstance(index, int)
        item.replace_all_uses_with(items[index])


def _in_int32(program: Program, route: Node, experts: Node) -> Node:
    """The experts as the op takes them; those that were int32 before a cast are taken so."""
    inner = argument(experts, 0) if is_call(experts, TO) else experts
    narrow = tensor_type(inner).dtype is torch.int32
    return inner if narrow else program.call(route, TO, experts, torch.int32)


def _matmul(program: Program, linear: Node) -> Node:
    """One call of npu_grouped_matmul; weights lie as [E, in, out]."""
    dtype = tensor_type(linear).dtype
    if is_call(linear, mixture_ops.grouped_linear):
        x, weight, _, counts = linear.args
        options: dict[str, Argument] = {}
    else:
        x, scale, weight, weight_scale, counts, _ = linear.args
        assert isinstance(weight_scale, Node)
        wide = dtype is not torch.bfloat16
        column = weight_scale if wide else _narrow(program, weight_scale)
        options = {"scale": [column], "per_token_scale": [scale]}
        options["output_dtype"] = npu.SCALAR_TYPES[dtype]
    assert isinstance(weight, Node)
    lists = ([x], [_turned(program, linear, weight)])
    options |= {"group_list": counts, **GROUPED}
    both = program.call(linear, npu.npu_grouped_matmul, *lists, kwargs=options)
    return program.call(linear, getitem, both, 0)


def _biased(program: Program, linear: Node, product: Node, owners: dict[Node, Node]) -> Node:
    """The rows of a product, each with the bias of its own expert. `owners` are those of a routing.

    npu_grouped_matmul takes biases in one dimension, each of a weight of its own.
    """
    routed, bias = argument(argument(linear, 3), 0), argument(linear, 2)
    if routed not in owners:
        flat = program.call(linear, RESHAPE, argument(routed, 1), [-1])
        both = program.call(linear, torch.ops.aten.sort.default, flat)
        owners[routed] = program.call(linear, getitem, both, 0)  # rows lie by their experts
    each = program.call(linear, torch.ops.aten.index_select.default, bias, 0, owners[routed])
    return program.call(linear, torch.ops.aten.add.Tensor, product, each)


def _turned(program: Program, linear: Node, weight: Node) -> Node:
    """The weight [E, in, out]: a view of the stored one at load time, if it is stored."""
    count, out, width = tensor_type(weight).shape
    if weight.op != "placeholder":
        return program.call(linear, torch.ops.aten.transpose.int, weight, 1, 2)
    turned = Expression("transpose", (expression_of(weight), 1, 2))
    type_ = TensorType(tensor_type(weight).dtype, (count, width, out))
    return program.placeholder(f"{weight.name.removesuffix('_int8')}_t", type_, turned)


def _narrow(program: Program, scale: Node) -> Node:
    narrow = cast(expression_of(scale), torch.bfloat16)
    type_ = TensorType(torch.bfloat16, tensor_type(scale).shape)
    return program.placeholder(f"{scale.name}_bf16", type_, narrow)
