"""The windows of a text that a model is judged on: each of them is a prompt of its own."""

from pathlib import Path

from kvc8.ir.checkpoint.model_files import place
from kvc8.ir.errors import ModelError
from kvc8.tools.driver.tokenizer import read_tokenizer
from kvc8.tools.evaluator.text import read_text


def windows_of(text: Path, model: Path, count: int, size: int) -> list[list[int]]:
    """The first windows of a text, by the tokenizer of a model; ModelError where it has too few."""
    tokenizer = read_tokenizer(model)
    tokens = tokenizer.encode(read_text(text))
    head = _head(tokens, tokenizer.encode(""))
    tokens, width = tokens[len(head) :], size - len(head)
    starts = range(0, len(tokens) - width + 1, width)[:count] if width > 0 else range(0)
    if size < 2 or len(starts) < count:
        what = f"gives {len(starts)} windows of {size} tokens and {count} are wanted"
        raise ModelError(place(text), what, "give a longer text, or fewer --windows")
    return [head + tokens[start : start + width] for start in starts]


def _head(tokens: list[int], empty: list[int]) -> list[int]:
    """The tokens that the tokenizer puts before any text, which have a part in each window.

    A window is a prompt of its own. Gemma asks for its first token, and without it does not
    compute what it was trained to: it then needs another place for what attention has left over.
    """
    same = [a == b for a, b in zip(tokens, empty, strict=False)]
    return tokens[: same.index(False) if False in same else len(same)]
