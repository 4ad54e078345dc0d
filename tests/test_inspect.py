"""kvc8-inspect: the whole sentence of each finding, the memory plan, and one whole report."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.sparse import LLAMA_70B, write_sparse
from torch import Tensor

from kvc8.ir.checkpoint.reader import read_files
from kvc8.tools import command
from kvc8.tools import inspect as tool
from kvc8.tools.benchmarks.measured import measured
from kvc8.tools.inspector.plan import plan
from kvc8.tools.inspector.seen import look
from kvc8.tools.inspector.stored import Stored
from kvc8.tools.inspector.verdicts import ENGINES, MINDIE, NEW, OLD, TRAPS, verdicts

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
# Without a model_type nothing is captured, so these directories are looked at in no time.
CONFIG: dict[str, object] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float16",
    "quantize": "w8a8",
}
LINEAR = {
    "weight": torch.zeros(4, 8, dtype=torch.int8),
    "input_scale": torch.ones(1),
    "input_offset": torch.zeros(1),
    "quant_bias": torch.zeros(4, dtype=torch.int32),
    "deq_scale": torch.ones(4, dtype=torch.int64),
}
K0, V1 = "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"
DESCRIPTION = "quant_model_description.json"


class Model:
    """A W8A8+C8 directory of two layers, to be changed before it is written."""

    def __init__(self) -> None:
        self.config = dict(CONFIG)
        self.tensors: dict[str, Tensor] = {}
        self.labels: dict[str, object] = {"kv_cache_type": "C8", "kv_quant_type": "C8"}
        for layer in range(2):
            for side in "kv":
                prefix = f"model.layers.{layer}.self_attn.{side}_proj"
                self.put(f"{prefix}.kv_cache_scale", torch.full((4,), 0.5).half(), "C8")
                self.put(f"{prefix}.kv_cache_offset", torch.zeros(4).half(), "C8")
                for part, value in LINEAR.items():
                    self.put(f"{prefix}.{part}", value.clone(), "W8A8")
        self.put("lm_head.weight", torch.zeros(16, 8).half(), "FLOAT")

    def put(self, name: str, tensor: Tensor, label: str) -> None:
        self.tensors[name], self.labels[name] = tensor, label

    def take(self, *parts: str) -> None:
        for name in [n for n in self.tensors if any(part in n for part in parts)]:
            del self.tensors[name], self.labels[name]

    def scale(self, prefix: str, *values: float) -> None:
        self.tensors[f"{prefix}.kv_cache_scale"] = torch.tensor(values).half()

    def write(self, directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        (directory / DESCRIPTION).write_text(json.dumps(self.labels))
        save_file(self.tensors, directory / "quant_model_weight_w8a8.safetensors")
        return directory


def found(directory: Path) -> dict[str, list[str]]:
    """The findings of each kind as sentences, but for the refusal of a model without a type."""
    seen = look(read_files(directory))
    said: dict[str, list[str]] = {}
    for finding in tool.find(seen):
        said.setdefault(finding.kind, []).append(f"{finding.severity}: {finding}")
    if "no model_type" in str(seen.refusal):
        said.pop("refused", None)
    return said


def test_a_sound_directory_has_no_finding(tmp_path: Path) -> None:
    assert found(Model().write(tmp_path)) == {
        "replicated": [
            "note: config.json: 2 KV heads are fewer than 4 or 8 cards, so each is kept 4 times "
            "on 8 cards; plan for the cache of 2 cards; more save none of it"
        ]
    }


def zero(m: Model) -> None:
    m.scale(K0, 0, 0, 1, 1)


def negative(m: Model) -> None:
    m.scale(V1, -1, 1, 1, 1)


def infinite(m: Model) -> None:
    m.scale(V1, float("inf"), 1, 1, 1)


def not_a_number(m: Model) -> None:
    m.scale(K0, 1, 1, 1, float("nan"))
    m.scale(K0.replace("0", "1"), 1, 1, 1, float("nan"))


def no_data(m: Model) -> None:
    for name in m.tensors:
        m.tensors[name] = torch.zeros_like(m.tensors[name])


def subnormal(m: Model) -> None:
    m.scale(K0, 3e-5, 6e-8, 7e-5, 1)


def offsets(m: Model) -> None:
    m.tensors[f"{K0}.kv_cache_offset"] = torch.tensor([-7.0, 0, 12, 0]).half()


def capped_offsets(m: Model) -> None:
    offsets(m)
    m.config["attn_logit_softcapping"] = 50.0


def v_offsets(m: Model) -> None:
    m.tensors[f"{V1}.kv_cache_offset"] = torch.tensor([3.0, 0, 0, 0]).half()


def half_offset(m: Model) -> None:
    m.tensors[f"{V1}.kv_cache_offset"] = torch.tensor([0.5, 0, 0, 0]).half()


def short(m: Model) -> None:
    m.scale(K0, 1, 1)


def missing(m: Model) -> None:
    m.take(f"{V1}.kv_cache")


def surplus(m: Model) -> None:
    m.config["num_hidden_layers"] = 1


def float32(m: Model) -> None:
    for name in [n for n in m.tensors if n.endswith("kv_cache_scale")]:
        m.tensors[name] = m.tensors[name].float()


def bfloat16(m: Model) -> None:
    m.config["torch_dtype"] = "bfloat16"


def float32_weight(m: Model) -> None:
    m.tensors["lm_head.weight"] = torch.zeros(16, 8)


def tied_and_stored(m: Model) -> None:
    m.config["tie_word_embeddings"] = True


def tied(m: Model) -> None:
    m.config["tie_word_embeddings"] = True
    m.take("lm_head")
    m.labels["lm_head.weight"] = "FLOAT"


def three_heads(m: Model) -> None:
    m.config |= {"num_key_value_heads": 3, "num_attention_heads": 9, "head_dim": 2}


def one_head(m: Model) -> None:
    m.config |= {"num_key_value_heads": 1, "head_dim": 4}


def label_without_tensor(m: Model) -> None:
    del m.tensors["lm_head.weight"]


def tensor_without_label(m: Model) -> None:
    del m.labels["lm_head.weight"]


def int8_without_label(m: Model) -> None:
    del m.labels[f"{K0}.weight"]


def int8_labeled_float(m: Model) -> None:
    m.labels[f"{K0}.weight"] = "FLOAT"


def strange_label(m: Model) -> None:
    m.labels[f"{K0}.weight"] = "W4A8"


def strange_entry(m: Model) -> None:
    m.labels["color"] = "blue"


def two_dtypes(m: Model) -> None:
    m.config["dtype"] = "bfloat16"


def odd_heads(m: Model) -> None:
    m.config["num_attention_heads"] = 5


def layer_types(m: Model) -> None:
    m.config["layer_types"] = ["full_attention"]


def says_float(m: Model) -> None:
    m.config["quantize"] = "float"


def says_nothing(m: Model) -> None:
    del m.config["quantize"]


def no_scales(m: Model) -> None:
    m.take("kv_cache")
    m.config["quantization_config"] = {"kv_quant_type": "C8"}


def no_c8(m: Model) -> None:
    m.take("kv_cache")
    m.labels |= {"kv_cache_type": None, "kv_quant_type": None}


def off(m: Model) -> None:
    m.labels |= {"kv_cache_type": None, "kv_quant_type": None}


def half_on(m: Model) -> None:
    m.labels["kv_cache_type"] = None


def c8_only(m: Model) -> None:
    m.config["quantize"] = None
    m.take(*(f"_proj.{part}" for part in LINEAR))


def heads_of_a_rank(m: Model) -> None:
    """MiniMax-M2.7's on each of 8 devices."""
    m.config |= {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 128}
    for name in [name for name in m.tensors if "kv_cache" in name]:
        m.put(name, m.tensors[name][:1].repeat(128), "C8")


def mixed(m: Model) -> None:
    m.take(*(f"{V1}.{part}" for part in LINEAR))
    m.put(f"{V1}.weight", torch.zeros(4, 8).half(), "FLOAT")


Change = Callable[[Model], None]
RUNS = "no value can be quantized there and kvc8-compile refuses the model"
TO_MINDIE = (
    "MindIE, which passes on a float's bits, and vllm-ascend, which adds them and never takes them "
    "off, answer wrongly; run it with kvc8, or quantize again with kv_sym=True for those"
)
OF_K = (
    "MindIE, which passes on a float's bits, answers wrongly (in vllm-ascend, which never takes "
    "them off, softmax does); run it with kvc8 or vllm-ascend, or quantize again without them for "
    "MindIE"
)
BELONG = "copy the description and the weights that belong together"
ORIGINAL = "correct it from the model's original config.json"
CASES: dict[Change, tuple[str, str]] = {
    zero: (
        "bad-scale",
        f"error: K of layer 0: 2 scales are zero, so {RUNS}; calibrate the KV cache again",
    ),
    negative: (
        "bad-scale",
        f"error: V of layer 1: 1 scale is negative, so {RUNS}; calibrate the KV cache again",
    ),
    infinite: (
        "bad-scale",
        f"error: V of layer 1: 1 scale is infinite, so {RUNS}; calibrate the KV cache again",
    ),
    not_a_number: (
        "bad-scale",
        f"error: K of layers 0-1: 2 scales are not a number, so {RUNS}; "
        "calibrate the KV cache again",
    ),
    no_data: (
        "no-data",
        "warning: the directory: every KV scale is zero, so its cost can be worked out and it "
        "compiles, but it does not run; copy the weights before you run it",
    ),
    subnormal: (
        "subnormal-scale",
        "warning: K of layer 0: 2 scales are subnormal in float16, so they have lost bits, and ops "
        "that multiply by the reciprocal may get infinity; "
        "calibrate with texts that reach these channels",
    ),
    offsets: (
        "k-offset",
        f"warning: K of layer 0: offsets are not zero (-7 to 12), so {OF_K}",
    ),
    capped_offsets: (
        "offset",
        f"warning: K of layer 0: offsets are not zero (-7 to 12), so {TO_MINDIE}",
    ),
    v_offsets: (
        "offset",
        f"warning: V of layer 1: offsets are not zero (0 to 3), so {TO_MINDIE}",
    ),
    half_offset: (
        "bad-offset",
        "error: V of layer 1: an offset is not a whole number from -256 to 256, so it names no "
        "code and kvc8-compile refuses the model; calibrate the KV cache again",
    ),
    short: (
        "width",
        "error: K of layer 0: the scale holds 2 numbers and config.json asks for 4, so it belongs "
        "to another model or another part of one; "
        "use the config.json and the weights that belong together",
    ),
    missing: (
        "missing-layer",
        "error: V of layer 1: there is no scale, and 1 layer has one, so the cache of these layers "
        "has no int8 form; calibrate the KV cache again",
    ),
    surplus: (
        "surplus-layer",
        "error: K of layer 1: there are scales and config.json says 1 layer, so config.json or the "
        "weights are of another model; correct num_hidden_layers, or take the right weights",
    ),
    float32: (
        "float32-scale",
        "warning: K of layers 0-1: scales are float32 and config.json says float16, so the "
        "vendor's runtimes, whose page asks for float16, may misread them; run it with kvc8, or "
        "quantize with the model loaded in float16",
    ),
    bfloat16: (
        "bfloat16",
        "warning: config.json: says bfloat16 beside an int8 KV cache, so it is outside of what the "
        "vendor supports (float16); compare its answers, or convert the model to float16",
    ),
    float32_weight: (
        "float32-weight",
        "warning: the directory: 1 weight is float32 and config.json says float16, so it takes "
        "twice the space; convert it, or quantize with the model loaded in float16",
    ),
    tied_and_stored: (
        "tied",
        "warning: config.json: ties the embedding to lm_head and lm_head.weight is stored too, so "
        "some runtimes take the one and some the other; "
        "remove it, or say tie_word_embeddings false if the two differ",
    ),
    tied: (
        "tied",
        "note: config.json: ties the embedding to lm_head, which is not stored, so kvc8 reads the "
        "embedding; msModelSlim does not save such a model; "
        "look at what wrote it before you give it to the vendor's runtimes",
    ),
    three_heads: (
        "parallel",
        "warning: config.json: 3 KV heads cannot be shared by 2, 4 or 8 cards, so these "
        "tensor-parallel sizes do not run; use 1 card or a divisor or a multiple of 3",
    ),
    one_head: (
        "replicated",
        "note: config.json: 1 KV head is fewer than 2, 4 or 8 cards, so each is kept 8 times on 8 "
        "cards; plan for the cache of 1 card; more save none of it",
    ),
    label_without_tensor: (
        "label-without-tensor",
        f"error: {DESCRIPTION}: labels lm_head.weight, which no weights file holds, so part of the "
        f"model is missing and kvc8-compile refuses it; {BELONG}",
    ),
    tensor_without_label: (
        "tensor-without-label",
        f"warning: {DESCRIPTION}: has no label for lm_head.weight, so kvc8 takes it as FLOAT and "
        f"other runtimes may not load it; {BELONG}",
    ),
    int8_without_label: (
        "tensor-without-label",
        f"error: {DESCRIPTION}: has no label for {K0}.weight, which is not floating point, so its "
        f"meaning is not known and kvc8-compile refuses it; {BELONG}",
    ),
    int8_labeled_float: (
        "wrong-label",
        f"error: {DESCRIPTION}: labels {K0}.weight FLOAT, which is not floating point, so it would "
        f"be read as what it is not and kvc8-compile refuses it; {BELONG}",
    ),
    strange_label: (
        "label",
        f"error: {DESCRIPTION}: has labels W4A8, which kvc8 does not read, so kvc8-compile refuses "
        "it; quantize the model to W8A8 with C8",
    ),
    strange_entry: (
        "unknown-entry",
        f"warning: {DESCRIPTION}: says color, which kvc8 does not know, so kvc8 leaves it out; "
        "check what wrote it",
    ),
    two_dtypes: (
        "config",
        "warning: config.json: torch_dtype is float16 and dtype is bfloat16, so runtimes differ in "
        f"which they take; kvc8 takes dtype; {ORIGINAL}",
    ),
    odd_heads: (
        "config",
        "error: config.json: num_attention_heads is 5 and num_key_value_heads 2, so query heads "
        f"cannot be shared out over KV heads; {ORIGINAL}",
    ),
    layer_types: (
        "config",
        "error: config.json: layer_types has 1 entry and num_hidden_layers is 2, so it is not "
        f"known which layer is of which kind; {ORIGINAL}",
    ),
    says_float: (
        "config",
        "warning: config.json: quantize is float and the linears are W8A8, so MindIE may look for "
        'other files or read them wrongly; write "quantize": "w8a8"',
    ),
    says_nothing: (
        "config",
        "note: config.json: quantize is null and the linears are W8A8, so MindIE may look for "
        'other files or read them wrongly; write "quantize": "w8a8"',
    ),
    no_scales: (
        "c8-without-scales",
        "error: config.json: says C8 and there are no KV scales, so kvc8-compile refuses it; copy "
        "the quantized model's weights and description, or remove kv_quant_type",
    ),
    no_c8: (
        "no-c8",
        "warning: the directory: there are no KV scales, so its cache stays float16 and takes "
        "twice the memory; quantize it with kvc8-quantize --use-kvcache-quant",
    ),
    off: (
        "c8-off",
        "warning: the directory: there are KV scales and nothing says C8, so MindIE and "
        "vllm-ascend leave them unused; "
        "write kv_cache_type and kv_quant_type C8 into the description",
    ),
    half_on: (
        "c8-off-vllm",
        f"warning: {DESCRIPTION}: has no kv_cache_type C8, so vllm-ascend leaves the KV scales "
        "unused; write kv_cache_type C8 beside kv_quant_type",
    ),
    c8_only: (
        "c8-only",
        "warning: the directory: there is C8 and no W8A8, so the vendor's runtimes do not support "
        "it; kvc8 does; add W8A8 with kvc8-quantize for those",
    ),
    heads_of_a_rank: (
        "nz-heads",
        "note: config.json: npu_fused_infer_attention_score on ascend910b takes heads and kv heads "
        "10 and 1 or 64 and 8 or 80 and 8 or 128 and 16 with cache format NZ, and this is 6 and 1 "
        "(op-plugin docs/zh/custom_APIs/torch_npu/npu_fused_infer_attention_score.md, NZ caches; "
        "ops-transformer incre_flash_attention_tiling_check.cpp:1868), though vllm-ascend serves "
        "16 and 2 (pull request 9721) and 6 and 1 (pull request 10461), so kvc8-compile refuses "
        "--kv-format nz; compile with --kv-format nd, or with --nz-heads any",
    ),
    mixed: (
        "mixed-linears",
        "warning: layer 1: q, k, v are not all of one kind, so MindIE, which packs them into one "
        "linear, cannot load it; roll all of them back to float, or none",
    ),
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_a_finding_says_what_it_is_what_follows_and_what_to_do(
    change: Change, tmp_path: Path
) -> None:
    model = Model()
    change(model)
    kind, sentence = CASES[change]
    assert sentence in found(model.write(tmp_path))[kind]


def test_everything_is_found_at_once(tmp_path: Path) -> None:
    model = Model()
    for change in (zero, negative, missing, tensor_without_label, bfloat16, half_on):
        change(model)
    assert {"bad-scale", "missing-layer", "tensor-without-label", "bfloat16", "c8-off-vllm"} <= set(
        found(model.write(tmp_path))
    )


def test_a_file_that_is_not_read_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, Model().write(tmp_path) / "model.safetensors")
    assert found(tmp_path)["unread-file"] == [
        "warning: the directory: model.safetensors is not read, so it has no effect; "
        "check that it is not needed"
    ]


def test_a_refusal_that_no_check_knows_is_a_finding(tmp_path: Path) -> None:
    seen = look(read_files(Model().write(tmp_path)))
    [first, *_] = tool.find(seen)
    assert f"{first.severity}: {first}".startswith("error: config.json: transformers 5.")
    assert str(first).endswith(
        "knows no model_type 'None', so kvc8-compile refuses it; "
        "correct it, or install a transformers that does"
    )


def test_the_memory_plan_of_llama_70b(tmp_path: Path) -> None:
    """Worked out by hand: 80 layers, K and V, 8 heads of 128; 70 GiB of weights."""
    weights = 70 * 2**30
    seen = look(read_files(Model().write(tmp_path)))
    tensors = {"w": seen.tensors[f"{K0}.weight"]}
    object.__setattr__(tensors["w"], "nbytes", weights)
    files = type(seen.files)(Path(), LLAMA_70B, None, {}, tensors, ())
    whole = Stored(files, LLAMA_70B, "float", 80, (1024,) * 80, {}, None)
    rows = {(row.cache, row.cards): row for row in plan(whole).rows}
    assert {key: row.bytes_per_token for key, row in rows.items()} == {
        ("float16", 1): 327_680,
        ("C8", 1): 163_840,
        ("C8", 2): 81_920,
        ("C8", 4): 40_960,
        ("C8", 8): 20_480,
    }
    assert rows["C8", 1].tokens == {32: 0, 64: 0}
    # 64 GiB - 35 GiB of weights = 29 GiB, over 80 KiB a token, in whole blocks of 128
    assert rows["C8", 2].tokens == {32: 0, 64: 29 * 2**30 // 81_920 // 128 * 128}
    assert rows["C8", 8].tokens == {32: (32 * 2**30 - 70 * 2**27) // 20_480 // 128 * 128} | {
        64: (64 * 2**30 - 70 * 2**27) // 20_480 // 128 * 128
    }


def for_vllm_ascend(model: Model) -> None:
    model.config["model_type"] = "qwen3"  # of a config that cannot be captured: nothing is


def for_mindie(model: Model) -> None:
    for_vllm_ascend(model)
    model.config["quantization_config"] = {"kv_quant_type": "C8"}


def of_llama(model: Model) -> None:
    model.config["model_type"] = "gpt2"


def windowed(model: Model) -> None:
    for_vllm_ascend(model)
    model.config["layer_types"] = ["full_attention", "sliding_attention"]


def in_float32(model: Model) -> None:
    for_vllm_ascend(model)
    model.config["torch_dtype"] = "float32"


def bits_of_bfloat16(model: Model) -> None:
    for_vllm_ascend(model)
    name = f"{K0}.deq_scale"
    model.tensors[name] = model.tensors[name].float()


def inputs_of_their_own(model: Model) -> None:
    for_vllm_ascend(model)
    name = f"{K0}.input_scale"
    model.tensors[name] = model.tensors[name] * 2


def named_as_transformers_5(model: Model) -> None:
    for_mindie(model)
    model.config["rope_parameters"] = {"rope_theta": 1e6}


NO_C8 = "finds no kv_quant_type C8 in quantization_config"
NAMES_KNOWN = "knows the KV scales of Qwen3, GLM-4 MoE and MiniMax-M2 only"
BESIDE = "never reads the description beside quantization_config"
HALF = "computes in float16 or bfloat16"
# What changes a directory, and what each engine says of it: the outcome, and what it stumbles over.
TOLD: dict[Callable[[Model], None], dict[str, tuple[str, ...]]] = {
    for_vllm_ascend: {MINDIE: ("leaves C8 off", NO_C8), OLD: ("runs right",), NEW: ("runs right",)},
    for_mindie: {
        MINDIE: ("runs right",),
        OLD: ("does not load", BESIDE),
        NEW: ("does not load", BESIDE),
    },
    of_llama: {
        MINDIE: ("leaves C8 off", NO_C8),
        OLD: ("does not load", NAMES_KNOWN),
        NEW: ("runs right",),
    },
    windowed: {
        MINDIE: ("leaves C8 off", NO_C8),
        **dict.fromkeys(
            (OLD, NEW), ("answers wrongly", "attends beyond the window in decode steps")
        ),
    },
    in_float32: {
        MINDIE: ("does not load", NO_C8, HALF),
        **dict.fromkeys((OLD, NEW), ("does not load", HALF)),
    },
    bits_of_bfloat16: {
        MINDIE: ("leaves C8 off", NO_C8),
        **dict.fromkeys(
            (OLD, NEW),
            ("answers wrongly", "copies the bits of deq_scale as numbers of another dtype"),
        ),
    },
    inputs_of_their_own: {
        MINDIE: ("leaves C8 off", NO_C8),
        **dict.fromkeys(
            (OLD, NEW), ("answers wrongly", "keeps one input scale of the linears that it packs")
        ),
    },
    named_as_transformers_5: {
        MINDIE: ("answers wrongly", "looks for rope_theta at the top of config.json"),
        **dict.fromkeys((OLD, NEW), ("does not load", BESIDE)),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("change", TOLD, ids=lambda change: change.__name__)
def test_what_each_engine_does_with_a_directory(
    tmp_path: Path, change: Callable[[Model], None]
) -> None:
    """What kvc8 makes of the model plays no part: it is not captured, and so is not refused."""
    model = Model()
    change(model)
    seen = replace(look(read_files(model.write(tmp_path))), refusal=None)
    found = verdicts(seen, [])
    said = {name: (v.outcome, *(trap.why for trap in v.traps)) for name, v in found.items()}
    assert said == TOLD[change]
    on = {name for name in (OLD, NEW) if said[name][0] in ("runs right", "answers wrongly")}
    assert {name for name, verdict in found.items() if verdict.care} == on


NZ = "it reads NZ pages in decode steps by npu_fused_infer_attention_score, which is documented for"
NZ_PAGE = (
    "op-plugin docs/zh/custom_APIs/torch_npu/npu_fused_infer_attention_score.md, NZ caches; "
    "ops-transformer incre_flash_attention_tiling_check.cpp:1868"
)


def test_where_nz_pages_are_not_documented_for_a_model_that_is_said(tmp_path: Path) -> None:
    """One card has 64 and 8 heads, and the document names those; eight have 8 and 1 each."""
    model = Model()
    model.config |= {"model_type": "qwen3", "num_attention_heads": 64, "head_dim": 64}
    model.config["num_key_value_heads"] = 8
    for name in [name for name in model.tensors if "kv_cache" in name]:
        model.put(name, model.tensors[name][:1].repeat(8 * 64), "C8")
    seen = replace(look(read_files(model.write(tmp_path))), refusal=None)
    found = verdicts(seen, [])
    assert found[MINDIE].care == ()
    assert found[OLD].care == found[NEW].care
    assert found[NEW].care[1:] == (
        f"{NZ} query dtype bf16, and not f16; head_dim 128, and not 64; heads and kv heads "
        "10 and 1 or 64 and 8 or 80 and 8 or 128 and 16, and not 32 and 4 on 2, 16 and 2 on 4, "
        f"8 and 1 on 8 cards ({NZ_PAGE}), though vllm-ascend serves 16 and 2 (pull request 9721) "
        "and 6 and 1 (pull request 10461)",
    )


def test_every_trap_is_met() -> None:
    """Those that a finding stands for are met where the findings are."""
    met = {why for told in TOLD.values() for _, *whys in told.values() for why in whys}
    own = {trap.why for trap in TRAPS if trap.here.__name__ != "<lambda>"}
    assert own - met == {f"looks for {DESCRIPTION} only"}


def test_a_description_under_another_name_is_not_found(tmp_path: Path) -> None:
    model = Model()
    for_mindie(model)
    directory = model.write(tmp_path)
    (directory / DESCRIPTION).rename(directory / "quant_model_description_w8a8.json")
    seen = replace(look(read_files(directory)), refusal=None)
    [trap] = [t for t in verdicts(seen, [])[NEW].traps if "looks for" in t.why]
    assert trap.outcome == "does not load"


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = command.entry(tool.parser(), tool.work, list(arguments))
    return status, capsys.readouterr().out


def test_an_error_is_exit_status_1_and_json_tells_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    zero(model)
    directory = str(model.write(tmp_path))
    status, text = inspect(capsys, directory)
    assert status == 1
    assert "error    K of layer 0: 2 scales are zero\n" in text
    status, text = inspect(capsys, directory, "--json")
    told = json.loads(text)
    assert status == 1
    assert told["findings"][0]["kind"] == "bad-scale"
    assert told["runtimes"] == {
        "kvc8": {"outcome": "refuses it"},
        **{name: {"outcome": "not asked", "why": [], "care": []} for name in ENGINES},
    }
    assert told["layers"][1]["cache"] == "int8 by channel, symmetric"


@pytest.mark.slow
def test_a_model_of_70b_is_inspected_without_reading_its_weights(tmp_path: Path) -> None:
    """85 GiB of holes: what reads a weight takes minutes and shows in the memory used."""
    directory = write_sparse(tmp_path / "model", LLAMA_70B)
    done = measured(tmp_path, "kvc8.tools.inspect", directory)
    report = done.output.splitlines()
    assert done.status == 0
    assert "  C8 on 8 cards, each             20,480        1,118,976        2,796,672" in report
    assert "  warning  the directory: every KV scale is zero" in report
    assert done.peak < 1000  # of which torch and transformers take half


@pytest.mark.slow
def test_the_whole_report_of_a_golden_directory(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(CHECKPOINTS)
    status, text = inspect(capsys, "qwen2_fp16_none_asym/quant")
    assert status == 0
    golden = GOLDEN / "inspect" / "qwen2_fp16_none_asym.txt"
    if request.config.getoption("--bless"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.name for p in CHECKPOINTS.iterdir() if p.is_dir()))
def test_each_golden_directory_reads_well_in_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(CHECKPOINTS)
    status, text = inspect(capsys, f"{name}/quant")
    assert status == 0
    assert max(map(len, text.splitlines())) <= 80
    assert ("clips K" in text) == (not name.startswith("v1_"))


@pytest.mark.slow  # captures a model
def test_reasons_for_the_ops_of_an_npu_program(capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(CHECKPOINTS / "qwen2_fp16_none_asym" / "quant")
    _, plain = inspect(capsys, directory)
    _, text = inspect(capsys, directory, "--explain")
    assert text.startswith(plain.rstrip())
    more = text[len(plain) :]
    assert "  attention over pages: 4 npu_fused_infer_attention_score: reads int8 pages" in more
    assert "      not npu_incre_flash_attention: " in more
    _, as_json = inspect(capsys, directory, "--explain", "--json")
    roles = [each["role"] for each in json.loads(as_json)["explain"]["choices"]["decode"]]
    assert "attention over pages" in roles
