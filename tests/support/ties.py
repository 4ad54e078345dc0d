"""Texts in which two right forms of one model may part, and a wrong one does in all of them."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Text = TypeVar("Text")


def on_one_of(texts: Iterable[Text], agree: Callable[[Text], None]) -> None:
    """Take one text after the other until both forms agree in one; the last error if none.

    Where there is no form in doubles to compare, float32 sums that CPUs and libraries take in their
    own order move a value by a few parts in 10**7. One in some ten thousand values lies so near to
    the middle between two codes, and gets another one. That is no fault, and hits few of the texts;
    a form that computes something else does so in every text.
    """
    *some, last = texts
    for text in some:
        try:
            return agree(text)
        except AssertionError:
            continue
    agree(last)
