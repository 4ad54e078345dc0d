"""Work out what type an op gives, from the op's own shape rule, once for each kind of call.

A decoder's layers make the same calls over and over, so a table of calls already seen answers
nearly all of them: 80 layers cost what 2 cost.
"""

from collections.abc import Callable

import sympy
import torch
from torch import SymInt
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from kvc8.ir.errors import IRError
from kvc8.ir.types import Dim, IntsType, IntType, TensorType, Type, dim, size

Op = Callable[..., object]

# Values the sizes stand for while a shape rule runs. Distinct primes, so that no two sizes and no
# product of one with a power of two look equal to it.
HINTS = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89)


class Shapes:
    """Infers the type of calls, and owns the sizes that appear in them."""

    def __init__(self) -> None:
        self._env = ShapeEnv()
        self._fake = FakeTensorMode(shape_env=self._env)
        self._fake.cache_enabled = False  # no call comes here twice, so it would only take time
        self._symbols: dict[sympy.Symbol, SymInt] = {}
        self._seen: dict[object, Type] = {}

    def infer(self, target: Op, args: tuple[object, ...], kwargs: dict[str, object]) -> Type:
        """The type that target(*args, **kwargs) gives, where types stand in place of values."""
        key = target, frozen(args), frozen(kwargs)
        found = self._seen.get(key)  # once, for such a key takes long to hash
        if found is None:
            found = self._seen[key] = self._run(target, args, kwargs)
        return found

    def _run(self, target: Op, args: tuple[object, ...], kwargs: dict[str, object]) -> Type:
        args, kwargs = _fixed(target, args, kwargs, self._hint)
        try:
            with enable_python_dispatcher(), self._fake:  # as torch.export asks for shapes
                named = {name: self._dummy(item) for name, item in kwargs.items()}
                result = target(*map(self._dummy, args), **named)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            what = f"does not take {_show(args)} {_show(kwargs)}".rstrip(" {}")
            raise IRError(str(target), f"{what} ({why})", "correct the call") from error
        self._check_free(target)
        return self._type(result)

    def _check_free(self, target: Op) -> None:
        """A rule that looked at a size's value would fix it to its hint, here and ever after."""
        for symbol, number in self._env.replacements.items():
            names = [str(name) for name, sym in self._symbols.items() if sym.node._expr == symbol]
            what = f"its shape rule takes the size {' '.join(names)} for {number}"
            raise IRError(str(target), what, "write the rule for any size")

    def _hint(self, number: IntType) -> int:
        """A value that stands for a whole number, where an op takes no symbolic one."""
        size = self._size(number.value)
        return size if isinstance(size, int) else int(size.node.hint)

    def _dummy(self, value: object) -> object:
        """A value without data for each type inside `value`."""
        match value:
            case TensorType(dtype=dtype, shape=shape):
                return torch.empty([self._size(d) for d in shape], dtype=dtype)
            case IntType(value=number):
                return self._size(number)
            case IntsType():
                return [1]  # no shape rule looks at how many there are
            case tuple() | list():
                return type(value)(self._dummy(item) for item in value)
        return value

    def _size(self, d: Dim) -> int | SymInt:
        if isinstance(d, int):
            return d
        if isinstance(d, sympy.Symbol):
            return self._symbol(d)
        symbols = {symbol: self._symbol(symbol).node for symbol in d.free_symbols}
        inner = d.xreplace({symbol: node.expr for symbol, node in symbols.items()})
        hint = d.xreplace({symbol: sympy.Integer(node.hint) for symbol, node in symbols.items()})
        return self._env.create_symintnode(inner, hint=int(hint))

    def _symbol(self, symbol: sympy.Symbol) -> SymInt:
        if symbol not in self._symbols:
            hint = HINTS[len(self._symbols)]
            source = ConstantSource(str(symbol))
            made = self._env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            sym = self._env.create_symintnode(made, hint=hint, source=source)
            assert isinstance(sym, SymInt)
            self._symbols[symbol] = sym
        return self._symbols[symbol]

    def _type(self, result: object) -> Type:
        match result:
            case torch.Tensor():
                return TensorType(result.dtype, tuple(self._dim(d) for d in result.shape))
            case int() | SymInt():
                return IntType(self._dim(result))
            case tuple() | list():
                return tuple(self._type(item) for item in result)
            case None:
                return ()
        raise IRError(f"{result!r}", "neither a tensor nor a whole number", "no op may give it")

    def _dim(self, d: int | SymInt) -> Dim:
        if isinstance(d, int):
            return d
        names = {sym.node.expr: size(str(symbol)) for symbol, sym in self._symbols.items()}
        return dim(d.node.expr.xreplace(names))


def _fixed(
    target: Op,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    hint: Callable[[IntType], int],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments, with numbers in place of types wherever the op's schema has plain ints.

    torch would make such a number of a symbolic size by fixing the size to its value.
    """
    if not isinstance(target, OpOverload):
        return args, kwargs
    plain = {a.name for a in target._schema.arguments if _takes_plain(a)}
    names = [a.name for a in target._schema.arguments]

    def fix(name: str, value: object) -> object:
        if isinstance(value, tuple | list):
            return type(value)(fix(name, item) for item in value)
        return hint(value) if name in plain and isinstance(value, IntType) else value

    fixed = tuple(fix(name, value) for name, value in zip(names, args, strict=False))
    return fixed, {name: fix(name, value) for name, value in kwargs.items()}


def _takes_plain(argument: torch.Argument) -> bool:
    """Whether an argument is a whole number, or a list of them that may not be symbolic."""
    kind = argument.real_type
    if kind.kind() == "ListType":
        return str(kind.getElementType().kind()) == "IntType"
    return str(kind) == "int"


def frozen(value: object) -> object:
    """A value that can be looked up in a table; 2, 2.0 and True are kept apart."""
    if isinstance(value, tuple | list):
        return tuple(map(frozen, value))
    if isinstance(value, dict):
        return tuple((name, frozen(item)) for name, item in value.items())
    return type(value), value


def _show(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_show, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}={_show(item)}' for name, item in value.items())}}}"
    return str(value)
