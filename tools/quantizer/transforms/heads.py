"""Which linears turn V within its heads: the one that makes it, and the one that reads it back.

Attention gives sums over tokens of V's rows, so V times R in each head, an orthogonal matrix over
the head's channels, gives what it gave times R, and the linear after it takes R's inverse. That
holds where nothing but moves lies between the first linear and the cache, and between attention and
the second: which is asked of the calls themselves, by running them on numbers that say where they
came from.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from kvc8.ir import ops
from kvc8.ir.program import Program, argument, is_call, substitute, tensor_type
from kvc8.ir.run import Value
from kvc8.tools.quantizer.sites import LINEAR
from kvc8.tools.quantizer.transforms.roles import NotTurned, Roles, Turn, where

ATEN = torch.ops.aten
CUTS = (ATEN.slice.Tensor, ATEN.split_with_sizes.default, ATEN.split.Tensor)
STEP = 1024.0  # between the numbers, so that a clamp or a rounding would show


def find_heads(program: Program, roles: Roles) -> str | None:
    """Put into `roles` what turns V in each layer; gives why there is none, if there is none."""
    why = None
    found = 0
    for call in program.calls(ops.paged_attention):
        try:
            _turn_layer(call, roles)
            found += 1
        except NotTurned as stuck:
            why = why or str(stuck)
    return None if found else why or "the model has no attention"


def linears_of_v(call: Node) -> tuple[Node, int, Node]:
    """An attention's linear that makes V, the first of its outputs that are V's, and its reader.

    Raises NotTurned where more than moves lies between them.
    """
    rows = argument(argument(call, 2), 1)
    heads, dim = (int(str(size)) for size in tensor_type(rows).shape[1:])
    made, start = _made_by(rows, heads * dim)
    read, chain = _read_by(call)
    sizes = [int(str(size)) for size in tensor_type(call).shape[1:]]
    numbers = torch.arange(sizes[0] * sizes[1], dtype=torch.float64) * STEP
    if not torch.equal(_run(chain, numbers.view(1, *sizes)).flatten(), numbers):
        raise NotTurned(f"{where(call)} changes what attention gives before it is read")
    return made, start, read


def _turn_layer(call: Node, roles: Roles) -> None:
    rows = argument(argument(call, 2), 1)
    heads, dim = (int(str(size)) for size in tensor_type(rows).shape[1:])
    made, start, read = linears_of_v(call)
    # Both are known to be sound before one of them is said.
    span = None if int(str(tensor_type(made).shape[-1])) == heads * dim else (start, heads * dim)
    new = Roles(roles.program)
    new.turn(made, 1, Turn(-2, dim, span))
    if len(made.args) > 2 and isinstance(made.args[2], Node):
        new.turn(made, 2, Turn(-1, dim, span))
    new.turn(read, 1, Turn(-1, dim))
    roles.join(new)


def _made_by(rows: Node, width: int) -> tuple[Node, int]:
    """The linear that V comes from, and the first of its outputs that V takes."""
    chain = [rows]
    while not is_call(chain[-1], LINEAR):
        inputs = chain[-1].all_input_nodes
        if len(inputs) != 1 or inputs[0].op != "call_function":
            raise NotTurned(f"{where(rows)} makes V of more than a linear")
        chain += inputs
    made, first = chain[-1], chain[-2] if len(chain) > 1 else rows
    for node, user in pairwise(chain[::-1]):
        if len(node.users) > 1 and not is_call(user, *CUTS) and not _item(user):
            raise NotTurned(f"{where(node)} makes more than V")
    outputs = int(str(tensor_type(made).shape[-1]))
    numbers = torch.arange(outputs, dtype=torch.float64).view(1, 1, -1)
    seen = _run(chain[-2::-1], numbers * STEP).flatten() / STEP
    start = int(seen[0])
    if not torch.equal(seen, torch.arange(start, start + width, dtype=torch.float64)):
        raise NotTurned(f"{where(rows)} changes V before it is cached")
    if len(made.users) > 1 and not _apart(made, first, start, width):
        raise NotTurned(f"{where(made)} makes more than V")
    return made, start


def _apart(made: Node, first: Node, start: int, width: int) -> bool:
    """Whether nothing else reads the outputs of a linear that are V's."""
    for user in made.users:
        if user is first:
            continue
        if not is_call(user, ATEN.slice.Tensor) or len(user.args) < 4:
            return False
        at, low, high = user.args[1:4]
        if not isinstance(low, int) or not isinstance(high, int):
            return False
        of_outputs = at in (len(tensor_type(made).shape) - 1, -1)
        if not of_outputs or not (high <= start or low >= start + width):
            return False
    return True


def _read_by(call: Node) -> tuple[Node, list[Node]]:
    """The linear that reads what attention gives, and the calls on the way to it."""
    chain = [call]
    while True:
        users = list(chain[-1].users)
        alone = len(users) == 1 and len(users[0].all_input_nodes) == 1
        if len(users) == 1 and is_call(users[0], LINEAR) and users[0].args[0] is chain[-1]:
            return users[0], chain[1:]
        if not alone:
            raise NotTurned(f"{where(call)} has something between attention and its linear")
        chain += users


def _run(calls: Sequence[Node], value: Tensor) -> Tensor:
    found: Value = value
    for call in calls:
        args = substitute(list(call.args), partial(_given, {call.all_input_nodes[0]: found}))
        assert isinstance(args, list)
        assert callable(call.target)
        found = call.target(*args, **call.kwargs)
    assert isinstance(found, Tensor)
    return found


def _given(values: Mapping[Node, Value], node: Node) -> Value:
    return values.get(node)


def _item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
