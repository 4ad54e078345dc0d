"""Find and read the small files of a model directory, trusting none of them.

A file belongs to a model directory when its name is bare (no directory parts) and leads to a
regular file that lies inside the directory. One symbolic link may leave it: the kind that
Hugging Face's cache makes, from `snapshots/<revision>/` to `blobs/` beside `snapshots`.
The directory itself may be reached through links.
"""

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvc8.ir.errors import ModelError

LARGEST_JSON = 100_000_000  # bytes; the limit that safetensors sets for its own header


def shown(value: object) -> str:
    """Show a name, or a value as JSON has it, as one line of at most 120 printable characters."""
    match value:
        case None | True | False:
            text = {None: "null", True: "true", False: "false"}[value]
        case dict() | list():
            text = "an object" if isinstance(value, dict) else "an array"
        case _:
            text = str(value)
    line = text if text.isprintable() else ascii(text)[1:-1]
    return line if len(line) <= 120 else line[:117] + "..."


def listed(names: Sequence[str]) -> str:
    """Show the first five of `names` and say how many more there are."""
    text = ", ".join(shown(name) for name in names[:5])
    return f"{text} and {len(names) - 5} more" if len(names) > 5 else text


def place(*parts: object) -> str:
    """Show a file, or a thing in it, at the head of an error: unlike a name, never shortened."""
    text = str(Path(*map(str, parts)))
    return text if text.isprintable() else ascii(text)[1:-1]


def model_file(directory: Path, name: str, named_by: Path | None = None) -> Path | None:
    """Find the file `name` of `directory`: None where nothing has that name.

    `named_by` is the file that gave the name, for the errors. Raises ModelError where the name has
    directory parts, leads out of the directory, or is not a regular file.
    """
    where = place(named_by or directory)
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ModelError(
            where,
            f"names '{shown(name)}', which is not the bare name of a file in the directory",
            "copy the file into the directory and name it without a path",
        )
    path = directory / name
    try:
        mode = path.stat().st_mode
        real, inside = path.resolve(), directory.resolve()
    except FileNotFoundError as error:
        if not path.is_symlink():
            return None
        raise ModelError(
            place(path), "is a link to a file that is not there", "copy the file here"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise ModelError(place(path), "is not a regular file", "put the file itself there")
    if not (real.is_relative_to(inside) or _in_blobs(real, inside)):
        raise ModelError(
            place(path), "is a link that leaves the model directory", "copy the file here"
        )
    return path


def _in_blobs(real: Path, directory: Path) -> bool:
    """Whether `real` is where a snapshot in Hugging Face's cache keeps its files."""
    return directory.parent.name == "snapshots" and real.parent == directory.parent.parent / "blobs"


def file_names(directory: Path) -> list[str]:
    """Name everything in `directory`, sorted; raises ModelError where it cannot be listed."""
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except FileNotFoundError as error:
        raise ModelError(
            place(directory), "no such directory", "check the path of the model"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error


def read_json(path: Path) -> dict[str, object]:
    """Read the JSON object in `path`.

    Raises ModelError where it cannot be read, is over 100 MB, is not JSON in UTF-8, is not an
    object, or says the same name twice (json itself would keep the last in silence).
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise ModelError(
                place(path),
                f"is {size} bytes long and {LARGEST_JSON} is the most that kvc8 reads",
                "check that this is the right file",
            )
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_json(data, place(path))


def parse_json(data: bytes, where: str) -> dict[str, object]:
    """Parse a JSON object, or raise ModelError at `where`, as `read_json` does."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        names = dict(items)
        if len(names) < len(items):
            seen = [name for name, _ in items]
            twice.append(next(name for name in names if seen.count(name) > 1))
        return names

    try:
        value: object = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise ModelError(where, f"is not JSON ({shown(error)})", "copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(
            where, f"holds {shown(value)} and should hold a JSON object", "copy the file again"
        )
    if twice:
        raise ModelError(where, f"says '{shown(twice[0])}' twice", "remove one of them")
    return value


def positive(config: Mapping[str, object], name: str, where: str) -> int:
    """Read a positive whole number that `config` must have, or raise ModelError."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 24:
        raise ModelError(
            where,
            f"{name} is {shown(value)} and should be a positive number",
            "correct it from the model's original config.json",
        )
    return value


def _unreadable(path: Path, error: Exception) -> ModelError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelError(
        place(path), f"cannot be read ({shown(why)})", "check the file and its rights"
    )
