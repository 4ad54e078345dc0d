"""What a user's `pip install` gets: all of kvc8, nothing beside it, and commands that exist."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["ir", "passes", "backends", "tools"]
SCRIPTS = {
    "tools/check",
    "tools/check-npu",
    "tools/check-older",
    "tools/check-portable",
    "tools/check-vllm",
    "tools/demo",
    "tools/environment.sh",
}  # for the repository, not for users
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def setuptools_major() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def product_files() -> set[str]:
    """Every file below the layers, as the wheel should name it."""
    files = (file for layer in LAYERS for file in (ROOT / layer).rglob("*") if file.is_file())
    names = {file.relative_to(ROOT).as_posix() for file in files}
    names.add("__init__.py")  # what `import kvc8` gives
    return {f"kvc8/{name}" for name in names - SCRIPTS if "__pycache__" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy, for setuptools leaves its own folders in the tree it builds."""
    if setuptools_major() < 77:  # what pyproject.toml requires; fetching it needs a network
        pytest.skip("setuptools 77 or newer is not installed here")
    tree = tmp_path_factory.mktemp("tree")
    for name in ["pyproject.toml", "README.md", "LICENSE", "__init__.py"]:
        shutil.copy(ROOT / name, tree)
    for layer in LAYERS:
        shutil.copytree(
            ROOT / layer, tree / layer, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return next((tree / "dist").glob("*.whl"))


def test_the_wheel_holds_all_of_kvc8_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    own = {name for name in names if ".dist-info/" not in name}
    assert own == product_files()
    assert {f"kvc8/{layer}/py.typed" for layer in LAYERS} <= own


def test_every_package_is_listed() -> None:
    folders = {
        file.parent.relative_to(ROOT) for layer in LAYERS for file in ROOT.glob(f"{layer}/**/*.py")
    }
    names = ["kvc8", *(f"kvc8.{'.'.join(folder.parts)}" for folder in folders)]
    assert sorted(names) == sorted(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_each_command_is_a_function(command: str) -> None:
    module, function = PROJECT["project"]["scripts"][command].split(":")
    assert callable(getattr(importlib.import_module(module), function))
