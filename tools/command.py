"""What every command does alike: its exit status, and how it says what is wrong.

0  done    1  an error, told as `error: where: what is wrong; what to do` on stderr
2  wrong usage    130  interrupted
"""

import argparse
import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvc8.ir.errors import KVC8Error

ERROR, INTERRUPTED = 1, 130
GARBAGE = 20_000  # objects made since garbage was looked for
NOTES = 4  # lines below an error, at most, and one that counts the others


def entry(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, do the work, and give the exit status.

    The parser gets `--traceback`, which shows where in kvc8 an error came from.
    """
    for each in _with_subcommands(parser):
        each.add_argument(
            "--traceback", action="store_true", help="show where in kvc8 an error came from"
        )
    given = parser.parse_args(arguments)
    # What torch and transformers make when imported is no garbage: to look for some takes 1 s with
    # Python's own threshold. And what is left at the end goes with the process.
    gc.set_threshold(GARBAGE)
    atexit.register(gc.freeze)
    try:
        with _warnings_as_lines():
            status = work(given)
            sys.stdout.flush()
        return status
    except (KVC8Error, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return ERROR
        if given.traceback:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        for note in _notes(error):
            print(f"  {note}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _with_subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of subcommands, or the parser itself where there are none."""
    kinds = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    return [sub for kind in kinds for sub in kind.choices.values()] or [parser]


def _sentence(error: KVC8Error | OSError) -> str:
    if isinstance(error, KVC8Error):
        return str(error)
    return f"{error.filename or 'the system'}: {error.strerror or error}; check the path"


def _notes(error: BaseException) -> list[str]:
    """What belongs to an error, the sites that a pass left alone for instance: the first few."""
    notes = getattr(error, "__notes__", [])
    left = len(notes) - NOTES
    return notes if left <= 1 else [*notes[:NOTES], f"and {left} more; --traceback shows them all"]


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show kvc8's own warnings, one line each, and nobody else's; torch's loggers keep quiet."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"kvc8\.|__main__")
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
