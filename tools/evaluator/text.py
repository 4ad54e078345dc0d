"""The text that a model is judged on, as it lies in its file; nothing heavy is imported."""

from pathlib import Path

from kvc8.ir.checkpoint.model_files import place, shown
from kvc8.ir.errors import ModelError


def read_text(path: Path) -> str:
    """A file's text; raises ModelError where it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"is not text in UTF-8 (byte {error.start})"
        raise ModelError(place(path), what, "save it as UTF-8") from error
    except OSError as error:
        why = shown(error.strerror)
        raise ModelError(place(path), f"cannot be read ({why})", "name a text") from error
