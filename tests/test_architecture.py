"""The shape of the house: who may import whom, and what no file may do."""

import ast
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "backends": {"ir", "backends"},
    "tools": {"ir", "passes", "backends", "tools"},
}
# Where each third party may be imported; what is not here may be imported nowhere.
THIRD_PARTIES = {
    "torch": ["*"],
    "numpy": ["*"],
    "networkx": ["*"],
    "sympy": ["ir/*"],  # torch's symbolic dimensions are its expressions
    "matplotlib": ["tools/evaluator/plot.py"],
    "rich": ["tools/*"],
    "jinja2": ["tools/reporter/*"],
    "markupsafe": ["tools/reporter/*"],  # jinja2 is made on it
    "transformers": [
        *("ir/capture/*", "tools/small_model.py", "tools/driver/tokenizer.py"),
        "tools/benchmarks/decode.py",  # measured against
    ],
    "tokenizers": ["tools/small_model.py"],
    "safetensors": [
        "ir/checkpoint*.py",
        "ir/checkpoint/safetensors_files.py",
        "backends/npu/artifact.py",
        "backends/npu/dumps.py",
    ],
    "onnx": ["backends/onnx/*"],
    "onnx_ir": ["backends/onnx/*", "tools/benchmarks/plain.py"],  # a graph written by hand
    "onnxruntime": ["backends/onnx/*", "tools/benchmarks/plain.py"],
    "google": ["backends/onnx/runner.py"],  # protobuf: what reading a damaged model raises
    "torch_npu": ["backends/npu/*"],
    "torchair": ["backends/npu/device.py"],  # a part of torch_npu's wheel
    "vllm": ["backends/vllm/*", "tools/benchmarks/serving.py"],  # which measures it
    "openvino": ["tools/benchmarks/stateful.py"],  # measured against
}
ONLY_INSIDE_FUNCTIONS = {"torch_npu", "torchair"}  # importing it needs CANN
TOP_LEVEL = {
    *MAY_IMPORT,
    *("tests", "docs", "pyproject.toml", "README.md", "README.zh-CN.md", "LICENSE", "__init__.py"),
}
LEFT_BY_BUILDS = ["build", "dist", "*.egg-info", "__pycache__"]
NAMELESS = {"base", "common", "helpers", "misc", "util", "utils"}
NOT_PASSES = {"__init__", "options", "pipeline", "rewrite"}
MOST_LINES, MOST_FILES = 400, 20

MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("add", "discard", "update", "setdefault", "popitem", "appendleft"),
}
CONTAINERS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque"}

FILES = sorted(file for layer in MAY_IMPORT for file in (ROOT / layer).rglob("*.py"))
PASSES = [file for file in FILES if file.parent.name == "passes" and file.stem not in NOT_PASSES]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@functools.cache
def imports_of(file: Path) -> list[tuple[str, bool]]:
    return list(imports(parse(file)))


def taken(files: list[Path], modules: set[str]) -> list[tuple[str, str]]:
    """The imports of some modules, with the file that has one."""
    return [(place(file), m) for file in files for m, _ in imports_of(file) if m in modules]


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, and whether a function does it and not the module itself."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from ((alias.name, inside) for alias in names)
            case ast.ImportFrom(module="kvc8", names=names):
                yield from ((f"kvc8.{alias.name}", inside) for alias in names)
            case ast.ImportFrom(module=module, level=level):
                yield "." * level + (module or ""), inside
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module, inside
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, inside or function)


def environment_reads(tree: ast.AST) -> list[int]:
    """The lines that touch the process's environment variables."""
    names = {"environ", "environb", "getenv", "putenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & names)
    ]


def module_state(tree: ast.Module) -> list[str]:
    """What lets a module remember: `global`, and module-level containers that functions change."""
    containers = {
        target.id
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign) and is_container(statement.value)
        for target in assigned(statement)
    }
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes = list(ast.walk(function))
            own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            own |= {n.arg for n in nodes if isinstance(n, ast.arg)}
            changed = {name for node in nodes for name in changes(node)}
            found += sorted(changed & (containers - own))
            found += [f"global {', '.join(n.names)}" for n in nodes if isinstance(n, ast.Global)]
    return found


def is_container(value: ast.expr | None) -> bool:
    match value:
        case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in CONTAINERS
    return False


def assigned(statement: ast.Assign | ast.AnnAssign) -> list[ast.Name]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [target for target in targets if isinstance(target, ast.Name)]


def changes(node: ast.AST) -> list[str]:
    """The names whose objects this node changes in place."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
            return [name] if method in MUTATORS else []
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            return [name]
    return []


def test_layers_are_imported_downwards() -> None:
    for file in FILES:
        here = place(file)
        for module, _ in imports_of(file):
            assert not module.startswith("."), f"{here}: {module}: import kvc8.… by its whole name"
            if module.split(".")[0] == "kvc8":
                other = module.split(".")[1]
                assert other in MAY_IMPORT[here.split("/")[0]], f"{here} may not import {other}"


ROOMS_OF_IR = ("kvc8.ir.checkpoint", "kvc8.ir.capture")
CORE = [file for file in FILES if file.parent == ROOT / "ir"]
COMMANDS = [file for file in FILES if file.parent == ROOT / "tools"]
SHARED_BY_COMMANDS = {"kvc8.tools.command"}


def test_the_core_of_ir_knows_no_checkpoint_and_no_capture() -> None:
    found = [(place(file), m) for file in CORE for m, _ in imports_of(file)]
    assert [each for each in found if each[1].startswith(ROOMS_OF_IR)] == []


def test_no_pass_imports_a_pass() -> None:
    assert taken(PASSES, {f"kvc8.passes.{other.stem}" for other in PASSES}) == []


def test_no_command_is_imported() -> None:
    commands = {f"kvc8.tools.{command.stem}" for command in COMMANDS} - SHARED_BY_COMMANDS
    assert taken(FILES, commands) == []


def test_no_test_imports_a_test() -> None:
    names = {other.stem for other in TESTS if other.stem.startswith("test_")}
    found = [(place(file), m) for file in TESTS for m, _ in imports_of(file)]
    assert [each for each in found if each[1].split(".")[0] in names] == []


def test_no_imports_go_in_a_circle() -> None:
    """Neither of modules nor of rooms; a folder inside of a room belongs to it."""
    modules, rooms = nx.DiGraph(), nx.DiGraph()
    for file in FILES:
        here = file.relative_to(ROOT).with_suffix("").parts
        for module, _ in imports_of(file):
            there = tuple(module.split(".")[1:])
            if module.startswith("kvc8.") and ROOT.joinpath(*there).with_suffix(".py").exists():
                modules.add_edge(here, there)
                rooms.add_edge(here[:-1][:2], there[:-1][:2])
    rooms.remove_edges_from([*nx.selfloop_edges(rooms)])
    assert [*nx.simple_cycles(modules)] == []
    assert [*nx.simple_cycles(rooms)] == []


def test_no_room_is_crowded() -> None:
    rooms = Counter(place(file.parent) for file in FILES)
    del rooms["passes"]  # a file a pass
    assert [room for room, count in rooms.items() if count > MOST_FILES] == []


def test_no_two_classes_have_one_name() -> None:
    named = Counter(
        node.name
        for file in FILES
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in named.items() if count > 1] == []


def test_third_parties_are_imported_at_their_addresses() -> None:
    for file in FILES:
        here = place(file)
        for module, inside in imports_of(file):
            package = module.split(".")[0]
            if package == "kvc8" or package in sys.stdlib_module_names:
                continue
            allowed = THIRD_PARTIES.get(package, [])
            at_home = any(fnmatch(here, pattern) for pattern in allowed)
            assert at_home, f"{here}: {package} only in {allowed}"
            late = inside or package not in ONLY_INSIDE_FUNCTIONS
            assert late, f"{here}: {package} only inside functions"


def test_only_tools_read_the_environment() -> None:
    others = [file for file in FILES if not place(file).startswith("tools/")]
    assert [(place(f), line) for f in others for line in environment_reads(parse(f))] == []


def test_no_module_remembers() -> None:
    assert [(place(file), what) for file in FILES for what in module_state(parse(file))] == []


def test_files_are_short_and_named_for_what_they_hold() -> None:
    lines = {place(file): file.read_text(encoding="utf-8").count("\n") for file in FILES}
    assert [here for here, count in lines.items() if count > MOST_LINES] == []
    assert [place(file) for file in FILES if file.stem in NAMELESS] == []


@pytest.mark.parametrize("file", PASSES, ids=lambda file: file.stem)
def test_a_pass_is_a_function_of_its_own_name_and_shows_what_it_does(file: Path) -> None:
    tree = parse(file)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert file.stem in functions
    lines = (ast.get_docstring(tree) or "").splitlines()
    assert "before:" in lines
    assert "after:" in lines


def test_the_top_level_holds_only_what_was_agreed() -> None:
    found = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    found = {name for name in found if not any(fnmatch(name, left) for left in LEFT_BY_BUILDS)}
    assert found - TOP_LEVEL == set()


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import a.b, c\nfrom kvc8 import ir\nfrom kvc8.passes import x\nfrom . import y\n"
        "def f():\n    if f:\n        import d\n    import_module('e')\n"
    )
    assert list(imports(ast.parse(source))) == [
        ("a.b", False),
        ("c", False),
        ("kvc8.ir", False),
        ("kvc8.passes", False),
        (".", False),
        ("d", True),
        ("e", True),
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("SEEN = []\ndef f(x):\n    SEEN.append(x)\n", ["SEEN"]),
        ("SEEN: dict[str, int] = {}\ndef f(x):\n    SEEN[x] = 1\n", ["SEEN"]),
        ("seen = collections.defaultdict(list)\ndef f(x):\n    del seen[x]\n", ["seen"]),
        ("def f(x):\n    global seen\n    seen = x\n", ["global seen"]),
        ("NAMES = ['a']\ndef f(x):\n    return NAMES[x]\n", []),
        ("seen = []\ndef f(x):\n    seen = []\n    seen.append(x)\n", []),
        ("TABLE = {}\nTABLE['a'] = 1\n", []),
    ],
)
def test_memory_is_found_and_tables_are_not_blamed(source: str, found: list[str]) -> None:
    assert module_state(ast.parse(source)) == found


def test_environment_reads_are_found() -> None:
    source = "import os\nfrom os import getenv\na = os.environ['A']\n"
    assert environment_reads(ast.parse(source)) == [2, 3]
