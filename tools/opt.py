"""kvc8-opt: a program's text in, named passes, the program's text out.

    kvc8-opt program.py --passes insert_kv_quant,fold_kv_scales
    kvc8-opt program.py --passes 'fold_v_scale{weights=false}'
    kvc8-opt program.py --verify
    kvc8-opt --run DIR

The text of a program is complete and each pass verifies its result, so a text and the names of
passes are all that a bug report needs. kvc8-compile --dump writes the program before each pass and
the pass with its options, which are written behind its name with spaces between them; an option
that is left out has its default. Lines that do not matter may be deleted as long as --verify
accepts the rest. Where numbers are wrong, kvc8-verify passes --bisect writes the DIR of --run: a
program, its tensors, and what it breaks.
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

from kvc8.ir.errors import ModelError
from kvc8.tools.command import entry

NO_PASSES = ("__init__", "options", "pipeline", "rewrite")  # files among those of passes


def parser() -> argparse.ArgumentParser:
    """The arguments of kvc8-opt."""
    found = argparse.ArgumentParser(prog="kvc8-opt", description=__doc__.splitlines()[0])
    found.add_argument("program", nargs="?", help="a file, or - for standard input")
    found.add_argument(
        "--verify", action="store_true", help="say that it verifies, instead of its text"
    )
    found.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="run a repro of kvc8-verify passes --bisect instead; 1 where it breaks its contract",
    )
    found.add_argument("--passes", default="", help=f"with commas between: {', '.join(names())}")
    return found


def names() -> list[str]:
    """The passes, each of which has a file of its name; to import them all takes seconds."""
    found = [Path(file.name) for file in files("kvc8.passes").iterdir()]
    return sorted(f.stem for f in found if f.suffix == ".py" and f.stem not in NO_PASSES)


def work(args: argparse.Namespace) -> int:
    """Read, run the passes, print; remarks go to standard error."""
    if args.run:
        return _repro(args.run)
    if args.program is None:
        raise ModelError("kvc8-opt", "no program given", "name a file, - or --run DIR")
    text = _text(args.program)
    from kvc8.backends.npu import emulation as _emulation  # noqa: F401  CPU kernels
    from kvc8.ir.text import parse, show
    from kvc8.ir.verify import verify
    from kvc8.passes.rewrite import name_of
    from kvc8.tools.driver.spelling import steps_of

    program = parse(text)
    verify(program)
    for step in steps_of(args.passes):
        for remark in step(program):
            print(f"{name_of(step)}: {remark}", file=sys.stderr)
    if args.verify:
        calls = sum(node.op == "call_function" for node in program.graph.nodes)
        print(f"{args.program}: a {program.stage.value} program of {calls} calls, verified")
    else:
        print(show(program))
    return 0


def _repro(folder: Path) -> int:
    from kvc8.tools.verifier.repro import run  # recording needs more than texts do

    problem = run(folder)
    print(problem or f"{folder}: keeps its contract", file=sys.stderr if problem else sys.stdout)
    return 1 if problem else 0


def _text(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(name, f"cannot be read ({error})", "name a program's text") from error


def main() -> int:
    """Run kvc8-opt."""
    return entry(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
