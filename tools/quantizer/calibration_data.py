"""Read the texts that a model is calibrated on, and turn them into tokens.

A file of JSON lines has one text a line, under `inputs_pretokenized` (msModelSlim's own), `text`,
`prompt`, as a chat under `messages`, or as tokens under `input_ids`. Any other file is plain text:
a blank line ends a text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap

from kvc8.ir.checkpoint.model_files import place, shown
from kvc8.ir.errors import ModelError

TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")
KEYS = "inputs_pretokenized, text, prompt, messages or input_ids"
COLUMNS, LINES = 60, 6  # of texts that are broken into lines
Content = str | list[dict[str, object]]  # a text, or the messages of a chat
Encode = Callable[[Content], list[int]]


@dataclass(frozen=True)
class Text:
    """One text, one chat or the tokens of one, and where it stands."""

    where: str
    content: Content
    tokens: list[int] | None = None


def read_texts(path: Path, most: int | None = None) -> list[Text]:
    """The first `most` texts of a file.

    Raises ModelError where the file cannot be read or holds no text, and at the line that is wrong.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            place(path), f"is not text in UTF-8 (byte {error.start})", "save it as UTF-8"
        ) from error
    except OSError as error:
        why = shown(error.strerror)
        raise ModelError(place(path), f"cannot be read ({why})", "name a file of texts") from error
    lines = path.suffix == ".jsonl" or content.lstrip().startswith("{")
    found = _json_lines(path, content, most) if lines else _paragraphs(path, content)
    if not found:
        raise ModelError(place(path), "holds no text", "write one text a line, as JSON")
    return found[:most]


def _json_lines(path: Path, content: str, most: int | None) -> list[Text]:
    found: list[Text] = []
    for number, line in enumerate(content.split("\n"), 1):
        if len(found) == most:
            break
        if line.strip():
            found.append(_text(f"{place(path)}: line {number}", line))
    return found


def _text(where: str, line: str) -> Text:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            where, f"is not JSON ({shown(error)})", "write one object a line"
        ) from error
    if not isinstance(entry, dict):
        raise ModelError(where, "is no object", 'write {"text": "..."}')
    if "messages" in entry:
        return Text(where, _messages(where, entry["messages"]))
    if "input_ids" in entry:
        return Text(where, "", _tokens(where, entry["input_ids"]))
    key = next((key for key in TEXT_KEYS if key in entry), None)
    if key is None:
        raise ModelError(where, f"has none of {KEYS}", "name its text so")
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise ModelError(where, f"{key} is {shown(entry[key]) or 'empty'}", "give it a text")
    return Text(where, entry[key])


def _tokens(where: str, tokens: object) -> list[int]:
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise ModelError(where, "input_ids is no list of tokens", "write whole numbers")
    return tokens


def _messages(where: str, messages: object) -> list[dict[str, object]]:
    sound = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )
    if not sound or not messages:
        raise ModelError(where, "messages is no list of role and content", "write a chat so")
    assert isinstance(messages, list)
    return messages


def _paragraphs(path: Path, content: str) -> list[Text]:
    found: list[Text] = []
    held: list[str] = []
    for number, line in enumerate([*content.splitlines(), ""], 1):
        if line.strip():
            held.append(line)
        elif held:
            found.append(Text(f"{place(path)}: line {number - len(held)}", "\n".join(held)))
            held = []
    return found


def with_lines(texts: Sequence[Text]) -> list[Text]:
    """Texts' first lines, of at most `COLUMNS` characters; chats and what has lines are left out.

    Texts of a data set tend to be one long line each, while other text is full of line breaks, at
    which models have keys like nowhere else. A few breaks of each text show that.
    """
    found = []
    for text in texts:
        if isinstance(text.content, str) and text.content:
            lines = [
                part for line in text.content.split("\n") for part in wrap(line, COLUMNS) or [""]
            ]
            broken = "\n".join(lines) != text.content
            found += [replace(text, content="\n".join(lines[:LINES]))] if broken else []
    return found


def encode_texts(
    texts: Sequence[Text], encode: Encode, most: int | None, vocabulary: int
) -> list[list[int]]:
    """The first `most` tokens of each text, all where it is None.

    Raises ModelError where a text has none, or one that is not in the model's vocabulary.
    """
    found = []
    for text in texts:
        tokens = (encode(text.content) if text.tokens is None else text.tokens)[:most]
        if not tokens:
            raise ModelError(text.where, "gives no tokens", "remove it")
        if (beyond := max(tokens)) >= vocabulary:
            what = f"gives token {beyond} and the model has {vocabulary}"
            raise ModelError(text.where, what, "copy the tokenizer that belongs to it")
        found.append(tokens)
    return found
