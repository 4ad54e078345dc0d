"""A program as the text of a Python function, and back: show(parse(text)) == text.

    def captured(
        input_ids: i64[T],                                       an input of each step
        k_cache_0: f16[N, S, 2, 32] = cache(),                   a KV cache
        norm: f16[64] = stored("model.norm.weight"),             a parameter and its expression
    ):
        mul: f16[1, T, 64] = aten.mul.Tensor(x, norm)  # model.norm
        return [mul]

The text is complete: nothing of a program is left out of it. The comment of a line is the module
that the node came from. Types of inputs are believed, those of calls are checked.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from textwrap import dedent
from types import MappingProxyType

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import Argument

from kvc8.ir import mixture_ops, ops, rank_ops  # noqa: F401  texts name what they declare
from kvc8.ir.errors import IRError
from kvc8.ir.expression import Arg, Expression
from kvc8.ir.program import Program, Stage, type_of
from kvc8.ir.shapes import Shapes
from kvc8.ir.types import DTYPE_NAMES, DTYPES, Dim, IntsType, TensorType, Type, dim, show_type, size

WIDTH = 100
NONE: Mapping[str, Expression] = MappingProxyType({})
SPACES = ("aten", "kvc8", "npu", "atb", "_c10d_functional")


def show(program: Program, expressions: Mapping[str, Expression] = NONE) -> str:
    """Write a program out, one line a node; parameters of those names with other expressions."""
    nodes = list(program.graph.nodes)
    head = [_show_input(n, expressions.get(n.name)) for n in nodes if n.op == "placeholder"]
    body = [_show_line(node) for node in nodes if node.op != "placeholder"]
    line = f"def {program.stage.value}({', '.join(head)}):"
    if len(line) > WIDTH:
        line = "\n".join([f"def {program.stage.value}(", *(f"    {x}," for x in head), "):"])
    return "\n".join([line, *body])


def show_node(node: Node) -> str:
    """Write one node as the line that it is in a program's text."""
    return _show_input(node) if node.op == "placeholder" else _show_line(node).strip()


def _show_input(node: Node, expression: Expression | None = None) -> str:
    text = f"{node.name}: {show_type(type_of(node))}"
    made = expression or node.meta.get("expression")
    return f"{text} = {made}" if made else text


def _show_line(node: Node) -> str:
    if node.op == "output":
        return f"    return {_show_arg(node.args[0])}"
    origin = node.meta.get("origin", "")
    line = f"    {node.name}: {show_type(type_of(node))} = {_show_call(node)}"
    return f"{line}  # {origin}" if origin else line


def _show_call(node: Node) -> str:
    args = [*map(_show_arg, node.args), *(f"{k}={_show_arg(v)}" for k, v in node.kwargs.items())]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if isinstance(node.target, OpOverload):
        return f"{str(node.target).removesuffix('.default')}({', '.join(args)})"
    return f"operator.{getattr(node.target, '__name__', node.target)}({', '.join(args)})"


def _show_arg(arg: Argument) -> str:
    if isinstance(arg, Node):
        return arg.name
    if isinstance(arg, tuple | list):
        return f"[{', '.join(map(_show_arg, arg))}]"
    return DTYPE_NAMES[arg] if isinstance(arg, torch.dtype) else repr(arg)


def parse(text: str, shapes: Shapes | None = None) -> Program:
    """Read a program back. Raises IRError, with the line, where the text is not one.

    `shapes` of a program that makes the same calls saves inferring them again.
    """
    text = dedent(text).strip()
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise IRError(
            f"line {error.lineno}", f"{error.msg}", "write one Python function"
        ) from error
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise IRError("line 1", "not one function", "write `def captured(...):` and its body")
    function = body[0]
    if function.name not in [stage.value for stage in Stage]:
        stages = ", ".join(stage.value for stage in Stage)
        raise IRError(
            "line 1", f"{function.name} is no stage", f"name the function one of {stages}"
        )
    program = Program(Graph(), Stage(function.name), shapes or Shapes())
    return _Reader(program, text.splitlines()).read(function)


class _Reader:
    """Reads the lines of one function into a program."""

    def __init__(self, program: Program, lines: list[str]) -> None:
        self.program, self.lines, self.nodes = program, lines, dict[str, Node]()

    def read(self, function: ast.FunctionDef) -> Program:
        params, defaults = function.args.args, function.args.defaults
        plain = len(params) - len(defaults)
        for param, default in zip(params, [*[None] * plain, *defaults], strict=True):
            expression = read_expression(default) if default else None
            node = self.program.placeholder(param.arg, _read_type(param.annotation), expression)
            self.nodes[param.arg] = node
        for line in function.body:
            self.read_line(line)
        return self.program

    def read_line(self, line: ast.stmt) -> None:
        match line:
            case ast.Return(value=ast.expr() as result):
                self.program.graph.output(self.arg(result))
            case ast.AnnAssign(target=ast.Name(id=name), annotation=note, value=ast.expr() as call):
                node = self.program.append(*self.call(call), name)
                node.meta["origin"] = self.lines[line.lineno - 1].partition("  # ")[2]
                self.nodes[name] = node
                if self.source(note) != show_type(type_of(node)):  # as a rule it is written so
                    _check_type(node, note)
            case _:
                raise IRError(f"line {line.lineno}", "not `name: type = op(...)`", "write it so")

    def source(self, expr: ast.expr) -> str:
        """The text of an expression that stands on one line, of ASCII as types are."""
        return self.lines[expr.lineno - 1][expr.col_offset : expr.end_col_offset]

    def call(
        self, call: ast.expr
    ) -> tuple[Callable[..., object], tuple[Argument, ...], dict[str, Argument]]:
        match call:
            case ast.Subscript(value=of, slice=index):
                return operator.getitem, (self.arg(of), self.arg(index)), {}
            case ast.Call(func=func, args=args, keywords=keywords):
                kwargs = {str(k.arg): self.arg(k.value) for k in keywords}
                return _read_op(func), tuple(self.arg(a) for a in args), kwargs
        raise IRError(f"line {call.lineno}", f"{ast.unparse(call)} is not a call", "write op(...)")

    def arg(self, expr: ast.expr) -> Argument:
        if isinstance(expr, ast.Name) and expr.id in self.nodes:
            return self.nodes[expr.id]
        if isinstance(expr, ast.Name) and expr.id in DTYPES:
            return DTYPES[expr.id]
        if isinstance(expr, ast.List):
            return [self.arg(item) for item in expr.elts]
        return _literal(expr)


def _literal(expr: ast.expr) -> str | int | float | bool | None:
    match expr:
        case ast.Constant(value=str() | int() | float() | None as constant):
            return constant
    if ast.unparse(expr) in ("inf", "-inf", "nan"):  # as Python shows what it cannot read
        return float(ast.unparse(expr))
    try:
        found = ast.literal_eval(expr)
    except ValueError:
        found = ()
    if found is not None and not isinstance(found, str | int | float | bool):
        what = f"{ast.unparse(expr)} is neither a value above nor a constant"
        raise IRError(f"line {expr.lineno}", what, "name a line above it")
    return found


def _check_type(node: Node, note: ast.expr) -> None:
    is_ = show_type(type_of(node))
    if ast.unparse(note) != ast.unparse(ast.parse(is_)):
        wrote = ast.unparse(note)
        raise IRError(node.name, f"written as {wrote} but is {is_}", "correct the text")


def _read_op(func: ast.expr) -> Callable[..., object]:
    space, *rest = _dotted(func).split(".")
    if space == "operator" and len(rest) == 1 and rest[0] in ("add", "sub", "mul", "floordiv"):
        found: Callable[..., object] = getattr(operator, rest[0])
        return found
    op, overload = [*rest, "default"][:2] if rest else ("", "")
    # only the namespaces of programs: torch.ops has attributes that load libraries
    packet = getattr(getattr(torch.ops, space), op, None) if op and space in SPACES else None
    named = getattr(packet, overload, None)
    if not isinstance(named, OpOverload):
        raise IRError(
            f"line {func.lineno}", f"there is no op {ast.unparse(func)}", "correct its name"
        )
    return named


def _dotted(expr: ast.expr) -> str:
    """What `ast.unparse` gives, which takes long, of the usual `space.op.overload`."""
    match expr:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=of, attr=name):
            return f"{_dotted(of)}.{name}"
    return ast.unparse(expr)


def _read_type(note: ast.expr | None) -> Type:
    match note:
        case ast.Subscript(value=ast.Name(id="ints"), slice=length):
            return IntsType(_read_dim(length))
        case ast.Subscript(value=ast.Name(id=dtype), slice=dims) if dtype in DTYPES:
            shape = dims.elts if isinstance(dims, ast.Tuple) else [dims]
            return TensorType(DTYPES[dtype], tuple(_read_dim(d) for d in shape))
    where = ast.unparse(note) if note else "an input without a type"
    raise IRError(where, "not a type", "write `f32[2, T]` or `ints[B]`")


def _read_dim(expr: ast.expr) -> Dim:
    """A dimension of an input: sums and products of ints and names."""
    match expr:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return size(name)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as sign, right=right):
            a, b = _read_dim(left), _read_dim(right)
            return dim(
                a + b
                if isinstance(sign, ast.Add)
                else a - b
                if isinstance(sign, ast.Sub)
                else a * b
            )
    raise IRError(f"{ast.unparse(expr)}", "not a size", "write sums and products of ints and names")


def read_expression(expr: ast.expr) -> Expression:
    """An expression from its syntax tree."""
    match expr:
        case ast.Call(func=ast.Name(id=op), args=args, keywords=[]):
            return Expression(op, tuple(map(_read_expression_arg, args)))
    raise IRError(f"{ast.unparse(expr)}", "not an expression", "see ir/expression.py")


def _read_expression_arg(expr: ast.expr) -> Arg:
    match expr:
        case ast.Call():
            return read_expression(expr)
        case ast.List(elts=items):
            return tuple(map(_read_expression_arg, items))
        case ast.Name(id=name) if name in DTYPES:
            return DTYPES[name]
    return _literal(expr)
