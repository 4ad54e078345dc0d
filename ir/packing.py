"""Take a packed linear apart again: two linears of some of its rows each, by expression."""

from torch.fx import Node
from torch.fx.node import Argument

from kvc8.ir.expression import Expression
from kvc8.ir.program import Program, expression_of, tensor_type
from kvc8.ir.types import TensorType


def parameters(linear: Node) -> list[Node]:
    """Weight, scale and bias of a linear: all of its tensors but the input."""
    return [node for node in linear.all_input_nodes if node is not linear.args[0]]


def parts(expression: Expression) -> tuple[Expression, ...]:
    """The expressions that a packed parameter is made of; nothing where it is not packed."""
    inner = expression.args[0] if expression.args else None
    if expression.op == "transpose" and isinstance(inner, Expression):
        return parts(inner)
    if expression.op != "concat" or expression.args[1] != 0 or not isinstance(inner, tuple):
        return ()
    return tuple(part for part in inner if isinstance(part, Expression))


def divide(program: Program, linear: Node, rows: int, cut: int) -> tuple[Node, Node]:
    """A linear of all rows but `cut` to `rows` of the first part, and one of those.

    The first part has `rows` rows. The linear itself stays for whoever still reads it.
    """
    near = [_near(program, parameter, rows, cut) for parameter in parameters(linear)]
    far = [_far(program, parameter, rows, cut) for parameter in parameters(linear)]
    return _with(program, linear, near), _with(program, linear, far)


def _near(program: Program, parameter: Node, rows: int, cut: int) -> Node:
    first, *others = parts(expression_of(parameter))
    expression = Expression("concat", ((Expression("slice", (first, 0, 0, cut)), *others), 0))
    return _like(program, parameter, expression, _rows(parameter) - rows + cut)


def _far(program: Program, parameter: Node, rows: int, cut: int) -> Node:
    expression = Expression("slice", (parts(expression_of(parameter))[0], 0, cut, rows))
    return _like(program, parameter, expression, rows - cut)


def _rows(parameter: Node) -> int:
    shape = tensor_type(parameter).shape
    return int(shape[-1] if expression_of(parameter).op == "transpose" else shape[0])


def _like(program: Program, parameter: Node, expression: Expression, rows: int) -> Node:
    """A parameter like another, of so many rows; transposed where that one is."""
    type_, old = tensor_type(parameter), expression_of(parameter)
    if old.op == "transpose":
        expression = Expression("transpose", (expression, *old.args[1:]))
        type_ = TensorType(type_.dtype, (type_.shape[0], rows))
    else:
        type_ = TensorType(type_.dtype, (rows, *type_.shape[1:]))
    return program.placeholder(f"{parameter.name}_part", type_, expression)


def _with(program: Program, linear: Node, tensors: list[Node]) -> Node:
    """The same linear with other parameters."""
    new = dict(zip(parameters(linear), tensors, strict=True))

    def swap(arg: Argument) -> Argument:
        return new.get(arg, arg) if isinstance(arg, Node) else arg

    assert callable(linear.target)
    options = {name: swap(value) for name, value in linear.kwargs.items()}
    return program.call(
        linear, linear.target, *map(swap, linear.args), kwargs=options, name="linear"
    )
