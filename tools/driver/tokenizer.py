"""Text to tokens and back, by the tokenizer of a model directory. Nothing in it is executed."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import jinja2  # type: ignore[attr-defined]

from kvc8.ir.checkpoint.model_files import model_file, place, read_json, shown
from kvc8.ir.errors import ModelError

UNFIT = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
BROKEN = "�"  # what a character gives of which a byte is still to come


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the tokens that end a text."""

    path: Path
    inner: PreTrainedTokenizerBase
    stops: frozenset[int]

    @property
    def has_chat(self) -> bool:
        """Whether the model says how to write a conversation."""
        return self.inner.chat_template is not None

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """The tokens of a text, or of a conversation that opens with it.

        Raises ModelError where there is no chat template, or it is broken.
        """
        if not chat:
            return [int(token) for token in self.inner.encode(text, verbose=False)]
        if not self.has_chat:
            raise ModelError(place(self.path), "has no chat template", "give --no-chat")
        try:
            written = self.inner.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except (*UNFIT, jinja2.TemplateError) as error:
            raise ModelError(
                place(self.path), f"its chat template fails ({shown(error)})", "give --no-chat"
            ) from error
        return [int(t) for t in self.inner.encode(str(written), add_special_tokens=False)]

    def encode_any(self, content: str | list[dict[str, object]]) -> list[int]:
        """The tokens of a text, or of the messages of a whole conversation."""
        if isinstance(content, str):
            return self.encode(content)
        if not self.has_chat:
            raise ModelError(place(self.path), "has no chat template", "give texts, not messages")
        written = self.inner.apply_chat_template(content, tokenize=False)  # type: ignore[arg-type]
        return [int(t) for t in self.inner.encode(str(written), add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without those that only mark beginning and end."""
        return str(self.inner.decode(tokens, skip_special_tokens=True))


class TextStream:
    """The text of tokens as they come, a piece at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """What this token adds; nothing while a character is not complete."""
        self.tokens.append(token)
        whole = self.tokenizer.decode(self.tokens)
        return "" if whole.endswith(BROKEN) else self._grow(whole)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._grow(self.tokenizer.decode(self.tokens))

    def _grow(self, whole: str) -> str:
        piece = whole[len(self.text) :]
        self.text = whole
        return piece


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a model directory or an artifact; raises ModelError where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inner = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except UNFIT as error:
        why = shown(str(error).strip().partition("\n")[0])
        raise ModelError(
            place(path), f"its tokenizer cannot be read ({why})", "copy the tokenizer's files there"
        ) from error
    return Tokenizer(path, inner, _stops(path, inner.eos_token_id))


def _stops(path: Path, of_tokenizer: object) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, the model's and the generation config's."""
    found = [of_tokenizer]
    for name in ("generation_config.json", "config.json"):
        if file := model_file(path, name):
            value = read_json(file).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
    return frozenset(token for token in found if type(token) is int)
