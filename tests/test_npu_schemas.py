"""NPU ops are declared as torch_npu declares them, and their shape rules tell the truth."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvc8.backends.npu import emulation
from kvc8.ir import npu
from kvc8.ir.errors import TargetError
from kvc8.ir.npu_shapes import SHAPE_RULES

VECTORS = Path(__file__).parent / "golden" / "npu_ops"
NAMES = [schema.partition("(")[0] for schema in npu.SCHEMAS]
Call = tuple[list[Any], dict[str, Any]]


def overload(qualified: str) -> torch._ops.OpOverload:
    namespace, name = qualified.split("::")
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), name).default
    return op


@pytest.mark.parametrize("schema", npu.SCHEMAS, ids=NAMES)
def test_the_dispatcher_has_the_recorded_schema(schema: str) -> None:
    assert str(overload(schema.partition("(")[0])._schema) == schema


def test_every_op_is_exported_and_has_a_rule_and_a_kernel() -> None:
    exported = {x.name() for x in vars(npu).values() if isinstance(x, torch._ops.OpOverload)}
    assert exported == set(NAMES)
    for key in ("Meta", "CPU"):
        for name in NAMES:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_functions_name_and_default_their_arguments_like_the_schema(name: str) -> None:
    schema = overload(name)._schema
    expected = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    order = [a.name for a in schema.arguments if not a.kwarg_only]
    kernel, rule = emulation._kernels()[name], SHAPE_RULES[name.split("::")[1]]
    for function in (kernel, rule):
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.default is not inspect.Parameter.empty:
                assert parameter.default == expected[parameter.name]
    positional = [p.name for p in inspect.signature(kernel).parameters.values() if p.kind == 1]
    assert positional == order


def vectors() -> dict[str, Callable[[], Call]]:
    """The calls of index.json, and some of the ops that it has no case of."""
    cases = json.loads((VECTORS / "index.json").read_text())["cases"]
    calls = {
        f"{'atb' if case['fn'].startswith('_') else 'npu'}::{case['fn']}|{case['id']}": case
        for case in cases
        if not case["fn"].startswith("atb_") and case["variant"] != "contradicts"
    }
    return {name: (lambda case=case: stored(case)) for name, case in calls.items()} | OTHERS


def stored(case: dict[str, Any]) -> Call:
    tensors = load_file(VECTORS / case["file"])

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if isinstance(value, dict) and "$tensor" in value:
            return tensors[f"in.{value['$tensor']}"]
        if isinstance(value, dict):
            return getattr(torch, value["$dtype"].removeprefix("torch."))
        return value

    kwargs = {name: decode(value) for name, value in case["kwargs"].items() if name != "_nz"}
    return [decode(value) for value in case["args"]], kwargs


def int8(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tnd() -> Call:
    q, k = torch.ones(5, 4, 16), torch.ones(7, 2, 16)
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    lengths = {"actual_seq_lengths": [2, 5], "actual_seq_lengths_kv": [3, 7]}
    heads = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND"}
    return [q, k, k], {"atten_mask": mask, "sparse_mode": 3, **lengths, **heads}


OTHERS: dict[str, Callable[[], Call]] = {
    "npu::npu_scatter_pa_kv_cache_functional|norm": lambda: (
        [int8(3, 2, 8), int8(3, 2, 8), int8(2, 4, 2, 8), int8(2, 4, 2, 8), int32(0, -1, 5)],
        {"cache_mode": "Norm"},
    ),
    "npu::npu_scatter_nd_update_|rows": lambda: (
        [int8(8, 2, 4), int32(7, 0, 3).view(3, 1), int8(3, 2, 4)],
        {},
    ),
    "npu::npu_fused_infer_attention_score|prefill": tnd,
    "atb::_npu_paged_attention|float": lambda: (
        [
            *(torch.ones(3, 4, 16), *[torch.ones(2, 8, 2, 16)] * 2, 2, 4, 0.25),
            *(int32(0, 1, 0).view(3, 1), int32(8, 5, 1), torch.empty(3, 4, 16)),
        ],
        {},
    ),
    # what lies transposed in memory comes out contiguous
    "npu::npu_quantize|transposed": lambda: ([torch.ones(5, 3).T, torch.ones(5), None, 1, -1], {}),
    "npu::npu_anti_quant|transposed": lambda: ([int8(5, 3).T, torch.ones(5)], {}),
    "npu::npu_rms_norm|transposed": lambda: ([torch.ones(5, 3).T, torch.ones(5)], {}),
    "npu::npu_rotary_mul|transposed": lambda: ([torch.ones(8, 3).T, *(torch.ones(3, 8),) * 2], {}),
    "npu::npu_swiglu|transposed": lambda: ([torch.ones(4, 3).T], {}),
    "npu::npu_rms_norm_quant|transposed": lambda: (
        [torch.ones(5, 3).T, torch.ones(5), torch.ones(5), torch.ones(1), int8(1)],
        {},
    ),
    "npu::npu_dequant_bias|int32": lambda: (
        [int32(5, -7, 9, 2).view(2, 2), torch.rand(2), None, int32(1, 2)],
        {"output_dtype": torch.float16},
    ),
    "npu::npu_dynamic_quant|transposed": lambda: ([torch.ones(4, 3).T], {}),
}
CALLS = vectors()


def test_every_op_is_called() -> None:
    assert {name.partition("|")[0] for name in CALLS} == set(NAMES)


def described(returned: Any) -> list[tuple[Any, ...]]:
    outputs = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return [(tuple(x.shape), x.dtype, x.stride(), x.device.type) for x in outputs]


@pytest.mark.parametrize("name", CALLS)
def test_the_shape_rule_and_the_kernel_agree(name: str) -> None:
    args, kwargs = CALLS[name]()
    op = overload(name.partition("|")[0])
    with FakeTensorMode() as mode:
        fake = op(*faked(args, mode), **faked(kwargs, mode))
    assert described(fake) == described(op(*args, **kwargs))


def faked(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, dict):
        return {name: faked(item, mode) for name, item in value.items()}
    if isinstance(value, list):
        return [faked(item, mode) for item in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_symbolic_dimensions_stay_symbolic(name: str) -> None:
    args, kwargs = CALLS[name]()
    op = overload(name.partition("|")[0])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = op(*faked(args, mode), **faked(kwargs, mode))
    real = described(op(*args, **kwargs))
    for output, (shape, dtype, *_) in zip(described(fake), real, strict=True):
        assert [int(size) for size in output[0]] == list(shape)
        assert output[1] == dtype
        first = (args[0][0] if isinstance(args[0], list) else args[0]).shape[0]
        if shape and shape[0] == first > 1:
            assert isinstance(output[0][0], torch.SymInt)


def test_written_arguments_come_back_themselves() -> None:
    for name in (
        "npu::npu_scatter_nd_update_|rows",
        "npu::npu_quant_scatter_|npu_quant_scatter___asym",
    ):
        args, kwargs = CALLS[name]()
        assert overload(name.partition("|")[0])(*args, **kwargs) is args[0]
    args, kwargs = CALLS["npu::npu_rope_quant_kvcache|npu_rope_quant_kvcache__fp16_page_gqa"]()
    outputs = npu.npu_rope_quant_kvcache(*args, **kwargs)
    assert outputs[3] is args[3]
    assert outputs[4] is args[4]


DEFINED_FIRST = """
import torch
schemas = [row for row in open({path!r}).read().splitlines() if not row.startswith("#")]
libraries = dict((name, torch.library.Library(name, "FRAGMENT")) for name in ("npu", "atb"))
for row in schemas:
    namespace, _, rest = row.partition("::")
    libraries[namespace].define(rest)
libraries["npu"].impl("npu_swiglu", lambda input, dim=-1: input, "Meta")
libraries["npu"].impl("npu_swiglu", lambda input, dim=-1: input, "CPU")
import kvc8.backends.npu.emulation
x = torch.ones(4)
assert torch.ops.npu.npu_swiglu(x) is x
print(*torch.ops.npu.npu_dynamic_quant(x[None])[0][0].tolist())
"""


@pytest.mark.slow
def test_ops_that_torch_npu_defined_first_are_left_alone() -> None:
    path = str(Path(npu.__file__).with_name("npu_schemas.txt"))
    script = DEFINED_FIRST.format(path=path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "127 127 127 127\n"), done.stderr


IMPORTED_ALONE = """
import sys
{hidden}
import kvc8.backends.npu
import torch
print("kvc8.ir.npu" in sys.modules, hasattr(torch.ops.atb, "_npu_reshape_and_cache"))
if not {installed}:
    print(*torch.ops.npu.npu_quantize(torch.ones(2), torch.ones(1), None, 1).tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "says"), [(False, "True True\n1 1\n"), (True, "False False\n")]
)
def test_importing_the_backend_declares_ops_where_torch_npu_is_not_installed(
    installed: bool, says: str, tmp_path: Path
) -> None:
    hidden = "sys.modules['torch_npu'] = None"
    if installed:
        (tmp_path / "torch_npu.py").touch()
        hidden = f"sys.path.insert(0, {str(tmp_path)!r})"
    script = IMPORTED_ALONE.format(hidden=hidden, installed=installed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, says), done.stderr


def fia(**changes: Any) -> Any:
    cache, scale = int8(2, 32, 32), torch.ones(2, 32)
    call = {"query": torch.ones(1, 1, 64), "key": cache, "value": cache, "block_size": 32}
    call |= {"num_heads": 4, "num_key_value_heads": 2, "antiquant_scale": scale}
    call |= {"block_table": int32(0, 1).view(1, 2), "actual_seq_lengths_kv": [33]}
    return npu.npu_fused_infer_attention_score(**(call | changes))


FIA = "npu_fused_infer_attention_score"
REFUSED: dict[str, Callable[[], Any]] = {
    "attention: input_layout SH is not known; use BSH, BSND, BNSD or TND": lambda: overload(
        "npu::npu_incre_flash_attention"
    )(*(torch.ones(1, 1, 8, device="meta"),) * 3, input_layout="SH"),
    f"{FIA}: a query [1, 1, 64] is not BNSD; use BSH, BSND, BNSD or TND": lambda: fia(
        input_layout="BNSD"
    ),
    f"{FIA}: int8 keys or values with several query rows a sequence; dequantize first": lambda: fia(
        query=torch.ones(1, 2, 64)
    ),
    f"{FIA}: actual_seq_lengths_kv is None for 1 sequences; give one length each": lambda: fia(
        actual_seq_lengths_kv=None
    ),
    f"{FIA}: block_size is 64 and the cache has blocks of 32; give the size of the cache": (
        lambda: fia(block_size=64)
    ),
    f"{FIA}: blocks of 16 torch.int8 rows; use a multiple of 32 up to 512": lambda: fia(
        block_size=16, key=int8(2, 16, 32), value=int8(2, 16, 32)
    ),
    f"{FIA}: actual_seq_lengths is [2] for 1 rows a sequence; give lengths that fit": lambda: fia(
        actual_seq_lengths=[2]
    ),
    f"{FIA}: keys have heads [2, 16] and values [2, 8]; give [2, 16], heads by head dimension": (
        lambda: fia(value=int8(2, 32, 16), antiquant_scale=torch.ones(2, 1))
    ),
    "npu_quantize: output type torch.float32 does not hold codes; use torch.int8": lambda: (
        npu.npu_quantize(torch.ones(2, 2), torch.ones(1), None, 6)
    ),
    f"{FIA}: keys of 2 sequences for queries of 1; give both for each": lambda: fia(
        key=torch.ones(2, 8, 32),
        value=torch.ones(2, 8, 32),
        block_table=None,
        antiquant_scale=None,
        actual_seq_lengths_kv=None,
    ),
    f"{FIA}: blocks of 32 torch.float32 rows; use a multiple of 128 up to 512": lambda: fia(
        query=torch.ones(1, 2, 64),
        key=torch.ones(2, 32, 32),
        value=torch.ones(2, 32, 32),
        antiquant_scale=None,
    ),
    f"{FIA}: sparse_mode 2 is not emulated; use 0, 3 or 4": lambda: fia(sparse_mode=2),
    f"{FIA}: pse_shift is not emulated; leave it out": lambda: fia(pse_shift=torch.ones(1)),
    f"{FIA}: an antiquant parameter is torch.float16[32] for a torch.float32 query; give 32 "
    "values, or one, in its dtype": lambda: fia(antiquant_scale=torch.ones(2, 32).half()),
    "attention: blocks [0, 7] of 2 for 33 rows; give 2 blocks that exist": lambda: fia(
        block_table=int32(0, 7).view(1, 2)
    ),
    "cache write: two rows have one slot; give unused rows the slot -1": lambda: (
        npu.npu_scatter_pa_kv_cache(
            *(int8(2, 2, 8),) * 2, *(int8(2, 4, 2, 8),) * 2, int32(1, 1), cache_mode="Norm"
        )
    ),
    "npu_quant_matmul: no torch.float16 results with a torch.bfloat16 scale; convert it": lambda: (
        npu.npu_quant_matmul(
            int8(2, 8), int8(8, 4), torch.ones(4).bfloat16(), output_dtype=torch.float16
        )
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_device_does_not_take_is_refused(message: str) -> None:
    with pytest.raises(TargetError) as refused:
        REFUSED[message]()
    assert str(refused.value) == message
