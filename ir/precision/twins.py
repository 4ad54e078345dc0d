"""Run ops twice at once: in the dtypes they name, and beside that in double precision.

Each tensor gets a twin. What is computed of tensors is computed of their twins as well, by the
same ATen calls with every float dtype replaced by float64, down into the CPU kernels of kvc8's ops
and of the emulated NPU ops. A twin is thus what a program means, with rounding out of the way:
forms that are equal in real numbers give twins that agree to many digits, whatever their dtypes and
the order of their sums. Codes have twins as well: what the quantizer gives
where nothing was rounded before.

Where a tensor's bits are read as another dtype, the twin starts again from the value itself.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from kvc8.ir.errors import IRError
from kvc8.ir.expression import STEPS, Arg, Expression, Read, make

F64 = torch.float64
INSIDE = ("kvc8", "npu", "atb")  # namespaces whose kernels are looked into
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
BITS = (torch.ops.aten.view.dtype,)


class Twins(TorchDispatchMode):
    """While it is entered, keeps a twin of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._twins: WeakIdKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Compute a call and its twin."""
        options = dict(kwargs or {})
        if func.namespace in INSIDE:
            with self:
                return func.redispatch(ON_CPU, *args, **options)
        twin_args = [substituted(arg, self._twin_of) for arg in args]
        twin_options = {name: substituted(arg, self._twin_of) for name, arg in options.items()}
        result = func(*args, **options)
        if func not in BITS and _holds_tensors(result):
            _both(result, func(*twin_args, **twin_options), self.pair)
        return result

    def of(self, value: object) -> object:
        """The twin of a value, a tensor or a tuple of them; another value is its own."""
        return substituted(value, lambda x: self.twin(x) if isinstance(x, Tensor) else x)

    def twin(self, tensor: Tensor) -> Tensor:
        """The twin of a tensor; one of its own value where it has none yet."""
        found = self._twins.get(tensor)
        if found is None:
            found = tensor.to(F64) if tensor.is_floating_point() else tensor.clone()
            found = found.clone() if found is tensor else found
            self._twins[tensor] = found
        assert isinstance(found, Tensor)
        return found

    def pair(self, tensor: Tensor, twin: Tensor) -> None:
        """Make one tensor the twin of another."""
        self._twins[tensor] = twin

    def _twin_of(self, value: object) -> object:
        if isinstance(value, Tensor):
            return self.twin(value)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return F64
        return value


def substituted(value: object, leaf: Callable[[object], object]) -> object:
    """A value, or each of the items of a list or tuple of them, put through a function."""
    if isinstance(value, tuple | list):
        return type(value)(substituted(item, leaf) for item in value)
    return leaf(value)


def _holds_tensors(value: object) -> bool:
    items = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, Tensor) for item in items)


def _both(value: object, twin: object, pair: Callable[[Tensor, Tensor], None]) -> None:
    if isinstance(value, Tensor) and isinstance(twin, Tensor):
        pair(value, twin)
    elif isinstance(value, tuple | list) and isinstance(twin, tuple | list):
        for a, b in zip(value, twin, strict=True):
            _both(a, b, pair)


def make_exact(expression: Expression, read: Read) -> Tensor:
    """The twin of a parameter: the same steps of the same stored tensors, every float as float64.

    Steps that work on float32 bits get float32; what rounds a scale up to a dtype still does.
    """
    if expression.op == "stored":
        return _wide(read(str(expression.args[0])))
    if expression.op == "stacked":
        return _wide(make(expression, read))
    if expression.op in ("int_bits", "fp19"):
        return _wide(STEPS[expression.op](make_exact(_inner(expression), read).float()))
    if expression.op not in STEPS:
        raise IRError(expression.op, "makes no tensor", f"use one of {', '.join(STEPS)}")
    keep = expression.op == "round_up"  # its dtype says which values there are
    args = [arg if keep and i else _exact_arg(arg, read) for i, arg in enumerate(expression.args)]
    return _wide(STEPS[expression.op](*args))


def _inner(expression: Expression) -> Expression:
    inner = expression.args[0]
    assert isinstance(inner, Expression)
    return inner


def _exact_arg(arg: Arg, read: Read) -> object:
    if isinstance(arg, Expression):
        return make_exact(arg, read)
    if isinstance(arg, tuple):
        return tuple(_exact_arg(item, read) for item in arg)
    return F64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg


def _wide(made: Tensor) -> Tensor:
    return made.to(F64) if made.is_floating_point() else made
