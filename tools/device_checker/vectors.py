"""The vendor's golden vectors (tests/golden/npu_ops), which a clone of the repository has."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
from kvc8.ir import npu
from kvc8.ir.checkpoint.safetensors_files import TensorFiles, read_header
from kvc8.ir.types import dtype_name
from kvc8.tools.device_checker.calls import SpelledCall

GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "golden"

# Integer outputs are held to be exact, whatever the tolerance of the index, but where the kernel
# rounds to half precision before it rounds to an integer and the golden does not.
ROUNDS_TWICE = ("_npu_quantize_per_tensor", "npu_rms_norm_quant", "atb_pre_rms_norm_quant")
# Held to the vendor's own tolerance only: with a float16 result npu_quant_matmul cuts its scale to
# 19 bits, up to 1/1024 below what this golden multiplies by, and the tolerance is 2/1000.
CUTS_ITS_SCALE = ("atb_linear",)

Case = Mapping[str, Any]
NUMBERS = {"int8": 1, "int32": 3, "float16": 5, "float32": 6, "qint8": 12, "bfloat16": 15}


def cases(golden: Path) -> dict[str, Case]:
    """The vectors by name; none where they do not lie."""
    index = golden / "npu_ops" / "index.json"
    if not index.is_file():
        return {}
    return {case["id"]: case for case in json.loads(index.read_text("utf-8"))["cases"]}


def primary(golden: Path) -> dict[str, Case]:
    """Those that no kernel contradicts."""
    return {name: c for name, c in cases(golden).items() if c["variant"] != "contradicts"}


def spelled(case: Case) -> SpelledCall | None:
    """The call of a case as text; None of an operation that torch has no overload for."""
    if case["fn"] in ATB_OPERATIONS:
        return None
    call, types = SpelledCall(case["fn"], {}), case["inputs"]
    names = [argument.name for argument in call.overload._schema.arguments]
    given = {**dict(zip(names, case["args"], strict=False)), **case["kwargs"]}
    given.pop("_nz", None)
    return call.changed({name: _spelled(name, value, types) for name, value in given.items()})


def _spelled(name: str, value: Any, types: Mapping[str, Any]) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, dict) and "$tensor" in value:
        of = types[value["$tensor"]]
        return f"{dtype_name(getattr(torch, of['dtype'].removeprefix('torch.')))}{of['shape']}"
    if isinstance(value, dict):  # a dtype, by its number among torch's scalar types
        return NUMBERS[value["$dtype"].removeprefix("torch.")]
    return f"ints[{len(value)}]" if "seq_lengths" in name and value else value


def load(case: Case, golden: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of a case and its expected outputs, by name."""
    files = TensorFiles()
    header = read_header(golden / "npu_ops" / case["file"])
    stored = {name: files.read(tensor) for name, tensor in header.items()}
    inputs = {name[3:]: tensor for name, tensor in stored.items() if name.startswith("in.")}
    return inputs, {name[4:]: tensor for name, tensor in stored.items() if name.startswith("out.")}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """An argument as index.json writes it."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict) and "$dtype" in value:
        return getattr(torch, value["$dtype"].removeprefix("torch."))
    return value


def run(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call the op of a case and name its outputs."""
    args = [decode(arg, tensors) for arg in case["args"]]
    kwargs = {name: decode(arg, tensors) for name, arg in case["kwargs"].items()}
    if case["fn"] in ATB_OPERATIONS:
        returned = ATB_OPERATIONS[case["fn"]](tensors, **kwargs)
    else:
        kwargs.pop("_nz", None)  # a mark for emulations that do not look at the caches' shapes
        namespace = torch.ops.atb if case["fn"].startswith("_") else torch.ops.npu
        returned = getattr(namespace, case["fn"])(*args, **kwargs)
    if isinstance(returned, Tensor):
        returned = (returned,)
    return {
        out["name"]: tensors[out["input"]] if out["from"] == "mutated" else returned[out["index"]]
        for out in case["outputs"]
    }


def atb_paged_attention(given: dict[str, Tensor], **param: Any) -> Tensor:
    """PagedAttentionOperation without offsets, as the torch op that builds it."""
    query, table, lens = given["query"], given["block_table"], given["context_lens"]
    acl = {torch.float16: 1, torch.bfloat16: 27}[query.dtype]
    out = torch.empty_like(query)
    sizes = param["kvHeadNum"], param["headNum"], param["qkScale"]
    caches = given["key_cache"], given["value_cache"]
    descales = given["k_descale"], given["v_descale"]
    npu.atb_paged_attention_quant(query, *caches, *sizes, table, lens, 1, acl, *descales, out)
    return out


def atb_linear(given: dict[str, Tensor], **param: Any) -> Tensor:
    """LinearOperation on int8: (x·w + bias)*deqScale."""
    weight = given["weight"].T if param["transposeB"] else given["weight"]
    bias = given["bias"].flatten() if param["hasBias"] else None
    dtype = {"ACL_FLOAT16": torch.float16, "ACL_BF16": torch.bfloat16}[param["outDataType"]]
    call = {"bias": bias, "output_dtype": dtype}
    found: Tensor = npu.npu_quant_matmul(given["x"], weight, given["deqScale"], **call)
    return found


def atb_rope(given: dict[str, Tensor], **param: Any) -> tuple[Tensor, ...]:
    """RopeOperation with rotaryCoeff 2, rotation by halves."""
    assert param == {"rotaryCoeff": 2}
    cos, sin = given["cos"][:, None], given["sin"][:, None]
    heads = (given[name].unflatten(1, (-1, cos.shape[-1])) for name in ("q", "k"))
    return tuple(npu.npu_rotary_mul(x, cos, sin).flatten(1) for x in heads)


def atb_dequant(given: dict[str, Tensor]) -> Tensor:
    """Elewise dequantization; its offset is the zero point and not minus it."""
    offset, scale = -given["offset"].float(), given["scale"].float()
    found: Tensor = npu.npu_anti_quant(given["x"], scale, offset=offset, dst_dtype=5)
    return found


def atb_pre_rms_norm_quant(given: dict[str, Tensor], **param: Any) -> tuple[Tensor, ...]:
    """RmsNormOperation, PRE_NORM and quantizing: codes of the norm of x + resIn, and the sum."""
    gamma, beta, scale, offset = (given[name] for name in ("gamma", "beta", "scale", "offset"))
    *_, total = npu.npu_add_rms_norm(given["x"], given["resIn"], gamma[0], param["epsilon"])
    codes = npu.npu_rms_norm_quant(total, gamma, beta, scale, offset, param["epsilon"])
    return codes, total


# ATB operations that torch has no overload for, or one that gives them other arguments: each is
# computed by the op that kvc8 offers in its place.
ATB_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "atb_paged_attention": atb_paged_attention,
    "atb_linear": atb_linear,
    "atb_rope": atb_rope,
    "atb_elewise_dequant_per_channel": atb_dequant,
    "atb_pre_rms_norm_quant": atb_pre_rms_norm_quant,
}
CALLED_BY = {  # whom such an operation is computed by
    "atb_paged_attention": "_npu_paged_attention_quant",
    "atb_linear": "npu_quant_matmul",
    "atb_rope": "npu_rotary_mul",
    "atb_elewise_dequant_per_channel": "npu_anti_quant",
    "atb_pre_rms_norm_quant": "npu_rms_norm_quant",
}


def accepts(got: Tensor, expected: Tensor, tol: Mapping[str, Any], *, exact: bool) -> bool:
    """Whether got is expected within a tolerance of index.json."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    a, b = got.double(), expected.double()
    if exact or tol["kind"] == "exact" or tol.get("tight_ulp") == 0:
        return torch.equal(a, b)
    error = (a - b).abs()
    error[(a == b) | (a.isnan() & b.isnan())] = 0  # infinities that agree
    match tol["kind"]:
        case "abs":
            return bool((error <= tol["atol"]).all())
        case "allclose":
            return bool((error <= tol["atol"] + tol["rtol"] * b.abs()).all())
        case "rel_max1":
            return bool((error <= tol["err"] * b.abs().clamp(min=1)).all())
        case "rtol_equal":  # a fraction of the values may miss it, in torch_npu's own tests
            bound = tol["prec"] * torch.maximum(a.abs(), b.abs()).clamp(min=1)
            allowed = 0 if expected.dtype == torch.bfloat16 else int(tol["prec"] * error.numel())
            return int((~(error <= bound)).sum()) <= allowed
    raise AssertionError(f"{tol['kind']} is not a tolerance that is known")


def without_tight(tol: Mapping[str, Any]) -> dict[str, Any]:
    """A tolerance as the vendor's own test has it."""
    return {name: value for name, value in tol.items() if name != "tight_ulp"}


def passes(case: Case, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether all outputs are what the vendor's golden function gave."""
    return all(
        accepts(
            got[out["name"]],
            expected[out["name"]],
            without_tight(out["tol"]) if case["fn"] in CUTS_ITS_SCALE else out["tol"],
            exact=not expected[out["name"]].is_floating_point() and case["fn"] not in ROUNDS_TWICE,
        )
        for out in case["outputs"]
    )
