"""What kvc8 says when it cannot go on: `where: what is wrong; what to do`."""

from typing import Self


class Sentence(Exception):
    """One sentence for the user, `where: what is wrong; what to do`, in its three parts."""

    def __init__(self, where: str, what: str, do: str) -> None:
        super().__init__(where, what, do)
        self.where, self.what, self.do = where, what, do

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.do}"

    def within(self, where: str) -> Self:
        """The same error, of something that lies in another."""
        return type(self)(where, f"{self.where}: {self.what}", self.do)


class KVC8Error(Sentence):
    """What ends a command: tools print it and exit 1."""


class ModelWarning(Sentence, UserWarning):
    """What is wrong with a model directory, or might be, and is no reason to stop."""


class IRError(KVC8Error):
    """A program that is not well formed, or is not what its stage allows."""


class ModelError(KVC8Error):
    """A model directory that cannot be read, trusted or captured."""


class TargetError(KVC8Error):
    """A program that a backend cannot emit or run."""
