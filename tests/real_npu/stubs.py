"""Stand-ins for the libraries of CANN, so that the real torch_npu loads on a machine without it.

    python stubs.py SITE_PACKAGES OUT

Every symbol that torch_npu's libraries leave open, and that neither torch nor the system nor
Python provides, becomes a C function that says "no driver" (507899); the device count is 0. Each
library that torch_npu asks for and nobody has is an empty one that needs that library. Nothing is
computed by any of it. Needs gcc, nm and readelf.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

NO_DRIVER = 507899  # ACL_ERROR_RT_DRV_INTERNAL_ERROR
POINTERS = {
    "aclGetRecentErrMsg": '"no driver"',
    "aclrtGetSocName": "0",
    "aclCreateDataBuffer": "0",
    "aclCreateTensorDesc": "0",
    "aclopCreateAttr": "0",
}
HARMLESS = {"aclFinalize", "aclInit", "aclAppLog", "aclmdlFinalizeDump", "MsprofRegisterCallback"}
COMPILE = ("gcc", "-w", "-O1", "-shared", "-fPIC")


def output(*command: str) -> str:
    """What a command prints; symbols and libraries that are not there are no error."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def symbols(library: Path, which: str) -> Iterator[str]:
    """The names that a library leaves open ("--undefined-only") or provides ("--defined-only")."""
    for line in output("nm", "-D", which, str(library)).splitlines():
        *_, kind, name = line.split()
        if which == "--defined-only" or kind == "U":  # a weak one may stay open
            yield name.split("@")[0]


def needed(library: Path) -> list[str]:
    """The libraries that a library asks for."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", str(library)))


def system_libraries() -> dict[str, Path]:
    """The libraries that the loader knows, by name."""
    known = re.findall(r"^\s+(\S+) \(.*=> (\S+)$", output("ldconfig", "-p"), re.M)
    return {name: Path(path) for name, path in reversed(known)}


def missing(site: Path) -> tuple[list[str], list[str]]:
    """The symbols and the libraries that nobody on this machine has."""
    package = site / "torch_npu"
    asking = [
        p for where in ("lib", ".", "dynamo/torchair/core") for p in package.glob(f"{where}/*.so")
    ]
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = list((Path(spec.origin).parent / "lib").glob("*.so*"))
    system, here = system_libraries(), {p.name for p in (*asking, *torch)}
    wanted = {name for library in asking for name in needed(library)} - here
    present = [system[name] for name in wanted if name in system]
    provided = {
        s for library in (*asking, *torch, *present) for s in symbols(library, "--defined-only")
    }
    opened = {s for library in asking for s in symbols(library, "--undefined-only")}
    absent = [n for n in wanted if n not in system and not n.startswith("ld-linux")]
    return sorted(s for s in opened - provided if not re.match("_?Py", s)), sorted(absent)


def function(symbol: str) -> str:
    """The C function that stands in for a symbol."""
    if symbol == "aclrtGetDeviceCount":
        return "int aclrtGetDeviceCount(unsigned *n) { *n = 0; return 0; }"
    if symbol in POINTERS:
        return f"const void *{symbol}(void) {{ return (const void *){POINTERS[symbol]}; }}"
    return f"int {symbol}(void) {{ return {0 if symbol in HARMLESS else NO_DRIVER}; }}"


def main(site: str, out: str) -> None:
    """Write the libraries."""
    names, absent = missing(Path(site))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "stubs.c", folder / "libcannstub.so"
    source.write_text("\n".join(map(function, names)) + "\n")
    subprocess.run([*COMPILE, "-Wl,-soname,libcannstub.so", "-o", library, source], check=True)
    for name in absent:
        link = [f"-Wl,-soname,{name}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]
        subprocess.run([*COMPILE, *link, "-o", folder / name, library], check=True)
    print(f"stubs: {len(names)} symbols in place of {', '.join(absent)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
