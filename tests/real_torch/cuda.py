"""Stand-ins for CUDA's libraries, so that an older torch of the registry loads without them.

    python cuda.py SITE_PACKAGES

The registry's torch for x86_64 is a CUDA build: 0.9 GB, and 3 GB of CUDA's libraries that a CPU
never calls. Each library that torch's ask for and nobody has becomes one whose functions say "no
device" (100), with the versions of symbols that torch names. Needs gcc, nm and readelf.
"""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice
COMPILE = ("gcc", "-w", "-O1", "-shared", "-fPIC")
# What static initializers of torch's CUDA code call: registering kernels, which nobody launches.
REGISTERS = re.compile("__cuda")
HANDLE = "__cudaRegisterFatBinary"
UNVERSIONED = re.compile("cu|nccl|nv|__cuda")  # of libraries that give their symbols no version


def output(*command: str) -> str:
    """What a command prints; symbols and libraries that are not there are no error."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def opened(library: Path) -> Iterator[tuple[str, str]]:
    """The symbols that a library leaves open, and the version that each is to have, or ""."""
    for line in output("nm", "-D", "--undefined-only", str(library)).splitlines():
        *_, kind, name = line.split()
        if kind == "U":
            symbol, _, version = name.partition("@")
            yield symbol, version.strip("@")


def versions(library: Path) -> Iterator[tuple[str, str]]:
    """The versions of symbols that a library asks for, each with the library that has it."""
    for part in output("readelf", "-VW", str(library)).split("File: ")[1:]:
        yield from ((version, part.split()[0]) for version in re.findall(r"Name: (\S+)", part))


def missing(libraries: list[Path]) -> list[str]:
    """The libraries that these ask for and nobody on this machine has."""
    wanted = {
        name
        for library in libraries
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", str(library)))
    }
    system = re.findall(r"^\s+(\S+) \(.*=> \S+$", output("ldconfig", "-p"), re.M)
    return sorted(wanted - {library.name for library in libraries} - set(system))


def function(symbol: str) -> str:
    """The C function that stands in for a symbol."""
    if symbol == HANDLE:
        return f"void *{symbol}(void) {{ static char handle[64]; return handle; }}"
    return f"int {symbol}(void) {{ return {0 if REGISTERS.match(symbol) else NO_DEVICE}; }}"


def write(folder: Path, name: str, symbols: dict[str, set[str]]) -> None:
    """Write a library with symbols by version."""
    source, script = folder / "stand_in.c", folder / "stand_in.map"
    source.write_text("\n".join(function(s) for s in sorted(set().union(*symbols.values()))))
    named = {version: sorted(found) for version, found in symbols.items() if version}
    each = (
        f"{version} {{ {'global: ' * bool(found)}{' '.join(f'{s};' for s in found)} }};"
        for version, found in named.items()
    )
    script.write_text("\n".join(each))
    versioned = [f"-Wl,--version-script,{script}"] if named else []
    made = ["-o", str(folder / name), str(source)]
    subprocess.run([*COMPILE, f"-Wl,-soname,{name}", *versioned, *made], check=True)
    source.unlink()
    script.unlink()


def main(site: str) -> None:
    """Write the libraries beside torch's own."""
    folder = Path(site) / "torch" / "lib"
    libraries = sorted(folder.glob("*.so*"))
    absent = missing(libraries)
    symbols: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in absent}
    owner = {v: name for library in libraries for v, name in versions(library) if name in symbols}
    for version, name in owner.items():
        symbols[name][version] = set()
    provided = {
        line.split()[-1].split("@")[0]
        for library in libraries
        for line in output("nm", "-D", "--defined-only", str(library)).splitlines()
    }
    for library in libraries:
        for symbol, version in opened(library):
            if version in owner:
                symbols[owner[version]][version].add(symbol)
            elif not version and symbol not in provided and UNVERSIONED.match(symbol):
                symbols[absent[0]][""].add(symbol)
    for name in absent:
        write(folder, name, symbols[name])
    print(f"cuda: stand-ins for {', '.join(absent)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
