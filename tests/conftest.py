"""What tests share: a real small model, and tiny random ones of every architecture we care for."""

import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # before torch is imported

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from kvc8.tools import small_model

REPOSITORY = Path(__file__).resolve().parent.parent

# One thread, so that a sum is taken in the same order on every machine.
torch.set_num_threads(1)
# How long an example takes tells of what else the machine does.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each kind is here for. A window of 8 is short enough for a short prompt to reach past it;
# heads of 32 make the projections wider than the model.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "qwen2": ("qwen2", {"head_dim": 16}),  # biases on q, k and v
    "qwen3": ("qwen3", {"head_dim": 32}),  # norms on q and k
    "qwen3_moe": (  # a router and four experts, of which each token takes two
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "glm4_moe": (  # groups of experts, a bias that only chooses, shared experts, a dense layer
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "minimax_m2": (  # stored as block_sparse_moe.experts.0.w1
        "minimax_m2",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
    ),
    "granitemoe": (  # stored with all experts in one
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (  # experts with biases, and weights that lie transposed
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch use two threads, for a test that takes long and compares with a tolerance."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct in float16; skips where no registry answers."""
    try:
        return small_model.fetch(REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    except small_model.RegistryError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(kind, tied=False, seed=0, **config)`: the directory of a random float32 model.

    Kinds are `KINDS`, or any model_type of transformers; what is given in `config` goes over them.
    A directory is made once and shared, so a test that damages one copies it first.
    """
    made: dict[str, Path] = {}

    def tiny_model(kind: str, tied: bool = False, seed: int = 0, **config: object) -> Path:
        key = repr((kind, tied, seed, sorted(config.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{kind}-{'tied' if tied else 'untied'}-{seed}-")
            _write_model(directory, kind, seed, {"tie_word_embeddings": tied, **config})
            _write_tokenizer(directory)
            made[key] = directory
        return made[key]

    return tiny_model


@pytest.fixture(scope="session")
def emitted(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., object]:
    """`emitted(kind, tied=False)` and `emitted(directory)`, which is quantized; made once each.

    Gives an onnx_models.Emitted.
    """
    from support.onnx_models import Emitted, captured, quantized

    from kvc8.backends.onnx.emitter import emit
    from kvc8.ir.checkpoint.reader import open_checkpoint

    @functools.cache
    def emitted(model: str | Path, tied: bool = False) -> Emitted:
        directory = tiny_model(model, tied=tied) if isinstance(model, str) else model
        program = captured(directory) if isinstance(model, str) else quantized(directory)
        out = tmp_path_factory.mktemp("onnx") / "out"
        emit(program, open_checkpoint(directory), out)
        return Emitted(program, directory, out)

    return emitted


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for programs written by hand."""
    from support.onnx_models import write_stored

    return write_stored(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="session")
def tiny_c8(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`tiny_c8(kind, linears, variant)`: a `tiny_model` with an int8 cache, by kvc8-quantize.

    `linears` are "w8a8" or "float". Variants: "symmetric"; "offsets", zero points a channel up to
    the extremes; "pre-rope", symmetric, K scales said to be measured before RoPE.
    """
    from support import c8

    made: dict[tuple[str, str, str], Path] = {}

    def tiny_c8(kind: str, linears: str = "w8a8", variant: str = "symmetric") -> Path:
        key = (kind, linears, variant)
        if key not in made:
            out = tmp_path_factory.mktemp("c8") / "-".join(key)
            if variant == "symmetric":
                layers = {} if kind == "gemma3" else {"num_hidden_layers": 2}
                c8.quantize_model(tiny_model(kind, **layers), out, linears)
            else:
                change = c8.with_offsets if variant == "offsets" else c8.before_rope
                change(tiny_c8(kind, linears), out)
            made[key] = out
        return made[key]

    return tiny_c8


def _write_model(directory: Path, kind: str, seed: int, config: dict[str, object]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, special = KINDS.get(kind, (kind, {}))
    whole = AutoConfig.for_model(model_type, **{**SIZES, **special, **config})
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        whole, dtype=torch.float32
    )
    # transformers starts biases at zero, norms at one and the rest near zero, and a pass that
    # forgets one of them would not be noticed. These keep every activation near one.
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * (0.5 if name.endswith("bias") else 0.2))
    model.save_pretrained(directory)


def _write_tokenizer(directory: Path) -> None:
    """One token a character of ASCII, so that text can be given to a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A space and a line feed are written so by byte-level tokenizers.
    characters = ["Ġ", "Ċ", *map(chr, range(ord("!"), ord("~") + 1))]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SIZES["max_position_embeddings"],
    ).save_pretrained(directory)


@pytest.hookimpl(trylast=True)  # after the order was made random
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, whatever the order: at the end one core would wait for them."""
    items.sort(key=lambda item: "smollm2" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Let no collection of garbage go over what torch and transformers made when imported."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--bless` writes golden programs instead of comparing with them."""
    parser.addoption("--bless", action="store_true", help="write golden programs; review the diff")
