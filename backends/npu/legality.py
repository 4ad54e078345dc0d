"""Whether a device takes the calls of a lowered program, before anything is written.

The limits are data, legality.json: by soc and op, each with its source. They are what documents
say; no device was asked. The real torch_npu's own shape functions check much less.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from types import MappingProxyType

from torch.fx import Node

from kvc8.ir.errors import TargetError
from kvc8.ir.program import Program, argument, op_name, tensor_type
from kvc8.ir.types import dtype_name

Limits = Mapping[str, object]
Broken = tuple[str, str]  # what is wrong, what to do


def limits(soc: str) -> Mapping[str, Limits]:
    """The limits of each op on a soc. Raises TargetError for a soc that has no table."""
    table = json.loads(files("kvc8.backends.npu").joinpath("legality.json").read_text())
    if soc not in table:
        known = ", ".join(sorted(table))
        raise TargetError(f"--soc: there are no limits for {soc}; choose one of {known}")
    found: Mapping[str, Limits] = table[soc]
    return found


def check(program: Program, soc: str, block_size: int) -> None:
    """Raise TargetError at the first call that breaks a limit, with its source."""
    table = limits(soc)
    for node in program.graph.nodes:
        name = op_name(node.target) if node.op == "call_function" else ""
        if name not in table or name not in CHECKS:
            continue
        for what, cure in CHECKS[name](node, table[name], block_size):
            where = f"{node.meta.get('origin') or node.name}: {name} on {soc} takes {what}"
            raise TargetError(f"{where} ({table[name]['source']}); {cure}")


def _input_dtype(node: Node, limit: Limits, _: int) -> Iterator[Broken]:
    yield from _dtype(argument(node, 0), limit, "dtypes")


def _dtype(node: Node, limit: Limits, key: str) -> Iterator[Broken]:
    allowed, found = limit[key], dtype_name(tensor_type(node).dtype)
    assert isinstance(allowed, list)
    if found not in allowed:
        yield f"{' or '.join(allowed)} and this is {found}", "compile with --dtype float16"


def _matmul(node: Node, limit: Limits, _: int) -> Iterator[Broken]:
    yield from _dtype(node, limit, "outputs")
    most = _int(limit, "last_dim_max")
    for side in tensor_type(argument(node, 1)).shape:
        if isinstance(side, int) and side > most:
            yield f"sides up to {most} and this is {side}", "keep this linear float"


def _attention(node: Node, limit: Limits, block_size: int) -> Iterator[Broken]:
    yield from _dtype(argument(node, 0), limit, "dtypes")
    q, packed = tensor_type(argument(node, 0)), node.kwargs.get("input_layout") == "TND"
    int8 = "key_antiquant_scale" in node.kwargs
    heads = node.kwargs["num_heads"]
    assert isinstance(heads, int)
    dim = q.shape[-1] if packed else int(q.shape[-1]) // heads
    step, most = _int(limit, f"head_dim_multiple{'_int8' * int8}"), _int(limit, "head_dim_max")
    if not isinstance(dim, int) or dim % step or dim > most:
        what = f"a head_dim that is a multiple of {step} up to {most} and this is {dim}"
        yield what, "compile for onnx instead"
    if "block_table" in node.kwargs:
        yield from _block(limit, block_size, int8)


def _block(limit: Limits, block_size: int, int8: bool) -> Iterator[Broken]:
    step = _int(limit, f"block_size_multiple{'_int8' * int8}")
    most = _int(limit, "block_size_max")
    if block_size % step or not 0 < block_size <= most:
        near = min(most, max(step, round(block_size / step) * step))
        what = f"a block size that is a multiple of {step} up to {most} and this is {block_size}"
        yield what, f"compile with --block-size {near}"


def _int(limit: Limits, key: str) -> int:
    found = limit[key]
    assert isinstance(found, int)
    return found


CHECKS: Mapping[str, Callable[[Node, Limits, int], Iterator[Broken]]] = MappingProxyType(
    {
        "npu_quantize": _input_dtype,
        "npu_quant_matmul": _matmul,
        "npu_fused_infer_attention_score": _attention,
        "npu_scatter_pa_kv_cache": _input_dtype,
    }
)
