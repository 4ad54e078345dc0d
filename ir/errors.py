"""What kvc8 says when it cannot go on: `where: what is wrong; what to do`."""


class KVC8Error(Exception):
    """One sentence for the user, `where: what is wrong; what to do`; tools print it and exit 1."""


class IRError(KVC8Error):
    """A program that is not well formed, or is not what its stage allows."""


class ModelError(KVC8Error):
    """A model directory that cannot be read, trusted or captured."""


class TargetError(KVC8Error):
    """A program that a backend cannot emit or run."""
