"""What a command can tell without torch it tells at once: its help, and what it refuses.

Importing torch takes a second and transformers two, so one process that says all of it and has
imported none of them shows that each is quick.
"""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from kvc8.tools import opt
from kvc8.tools.driver.spelling import PASSES

LLAMA = Path(__file__).parent / "golden" / "checkpoints" / "llama_fp16_m3" / "quant"
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "matplotlib", "jinja2", "networkx")
COMMANDS = (
    *("compile", "quantize", "convert", "run", "verify", "evaluate", "inspect", "opt"),
    "device_check",
)
RUN = """
import contextlib, importlib, io, json, sys
told, asked, heavy = [], *map(json.loads, sys.argv[1:])
for name, *given in asked:
    sys.argv = [name, *given]
    wrong = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(wrong):
        try:
            status = importlib.import_module(f"kvc8.tools.{name}").main()
        except SystemExit as exit:
            status = exit.code
    told.append([status, wrong.getvalue()])
print(json.dumps([told, [name for name in heavy if name in sys.modules]]))
"""


def run(*asked: tuple[str | Path, ...]) -> list[list[object]]:
    """The exit status and the errors of commands that one process runs, without what is heavy."""
    given = json.dumps([[*map(str, each)] for each in asked]), json.dumps(HEAVY)
    command = [sys.executable, "-c", RUN, *given]
    told, heavy = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert heavy == []
    return told


def damaged(folder: Path, model_type: str, cut: int) -> Path:
    """A model whose config.json says another model_type, and whose weights are cut short."""
    shutil.copytree(LLAMA, folder)
    config = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    [weights] = folder.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) - cut])
    return folder


def test_help_imports_nothing_heavy():
    assert run(*((name, "--help") for name in COMMANDS)) == [[0, ""]] * len(COMMANDS)


def test_what_can_be_refused_at_once_is_refused_before_anything_heavy_is_imported(tmp_path):
    none, empty, out, here = (tmp_path / name for name in ("none", "empty", "out", "texts.txt"))
    empty.mkdir()
    here.write_text("a text")
    unknown, cut = damaged(tmp_path / "unknown", "lama", 0), damaged(tmp_path / "cut", "llama", 1)
    weights = cut / "quant_model_weight_w8a8.safetensors"
    size = weights.stat().st_size
    npu = ("--target", "npu", "-o", out)
    no_directory = f"{none}: no such directory; check the path of the model"
    cases = {
        ("compile", none, *npu): no_directory,
        ("compile", empty, *npu): f"{empty}: has no config.json; "
        "name the directory of a Hugging Face model",
        ("compile", LLAMA, "--target", "npu", "-o", empty): f"{empty}: exists already; "
        "choose another directory or remove it",
        ("compile", LLAMA, *npu, "--flavor", "gqa"): "--flavor: is of --target onnx; "
        "leave it out, or compile for onnx",
        ("compile", LLAMA, *npu, "--soc", "ascend310p"): "--soc: there are no limits for "
        "ascend310p; choose one of ascend910b",
        ("compile", LLAMA, *npu, "--tp", "3"): "shard: 8 heads over 2 KV heads do not divide among "
        "3 ranks; use one of 2, 4, 8",
        ("compile", unknown, *npu): f"config.json: transformers {version('transformers')} knows no "
        "model_type 'lama'; correct it, or install a transformers that does",
        ("compile", cut, *npu): f"{weights}: is {size} bytes long and its header describes "
        f"{size + 1}; copy the file again",
        ("quantize", none, "-o", out, "--calib-file", here): no_directory,
        ("quantize", LLAMA, "-o", out, "--calib-file", none): f"{none}: cannot be read (No such "
        "file or directory); name a file of texts",
        ("convert", none, "--for", "mindie", "-o", out): no_directory,
        ("verify", "forms", none): no_directory,
        ("verify", "forms", LLAMA, "--tp", "3"): "shard: 8 heads over 2 KV heads do not divide "
        "among 3 ranks; use one of 2, 4, 8",
        ("inspect", none): no_directory,
        ("evaluate", none, "--against", LLAMA, "--text", here): no_directory,
        ("run", LLAMA, "--prompt", "a"): f"{LLAMA}: has no manifest.json; "
        "name what kvc8-compile wrote for npu",
        ("opt", none): f"{none}: cannot be read ([Errno 2] No such file or directory: '{none}'); "
        "name a program's text",
    }
    assert run(*cases) == [[1, f"error: {sentence}\n"] for sentence in cases.values()]


def test_inspect_says_what_the_files_do_before_anything_heavy_is_imported():
    """Here up to the memory of the cache; then the import of torch, which is barred, ends it."""
    code = f"""
import sys
sys.modules |= dict.fromkeys({HEAVY!r})
from kvc8.tools.inspect import main
main()
"""
    command = [sys.executable, "-c", code, str(LLAMA)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    head, layers, memory = done.stdout.split("\n\n")
    assert head.endswith(
        "layout      msModelSlim's ascendV1, K measured pre-rope\n"
        "  weights     208 tensors in 1 file, 3.2 MB"
    )
    assert "float16 down; cache int8 by channel,\n              symmetric\n" in layers
    assert f"  {'C8':<22}{512:>16}" in memory
    assert "ModuleNotFoundError: import of torch halted" in done.stderr


def test_the_help_of_opt_names_each_pass():
    assert opt.names() == sorted(PASSES)
