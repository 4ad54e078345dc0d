"""Whether transformers knows a model_type, told from its sources: importing it takes seconds."""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from kvc8.ir.errors import ModelError

TABLES = ("configuration_auto.py", "auto_mappings.py")  # of transformers.models.auto


def check_model_type(config: Mapping[str, object]) -> None:
    """Raise ModelError where no table of transformers has the config's model_type in it.

    One that has it somewhere passes, and so does any where the tables are not to be found: whoever
    builds the model asks transformers itself.
    """
    kind = str(config.get("model_type"))
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "models" / "auto"
    tables = [
        path.read_text(encoding="utf-8") for name in TABLES if (path := folder / name).exists()
    ]
    if tables and not any(f'"{kind}"' in table for table in tables):
        raise unknown(kind)


def unknown(kind: str) -> ModelError:
    """What is said of a model_type that transformers does not know."""
    what = f"transformers {version('transformers')} knows no model_type {kind!r}"
    return ModelError("config.json", what, "correct it, or install a transformers that does")
