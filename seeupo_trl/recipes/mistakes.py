"""
What a user did wrong is said in a line or two on the standard error, with exit code 2; a bug keeps its traceback.

Which is which, the error's origin says: a statement `raise` that somebody wrote for a wrong value or a missing file or
package, against what Python or a library runs into.
"""

import difflib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


TRACEBACK_VARIABLE = "SEEUPO_TRACEBACK"
EXIT_CODE = 2
SECONDS_FOR_THE_FIRST = 10.0

_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = (_PACKAGE, _PACKAGE.parent / "examples")


_program: str | None = None


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what can."""


def replace_what_cannot_be_printed() -> None:
    """
    Have the standard output print `?` for what its encoding has not, as the blocks of a curve or an emoji of the
    policy's, in place of ending the run. (The standard error escapes it as Python starts.)
    """
    # a notebook's has no encoding
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def call_program(name: str) -> None:
    """Name the program in messages otherwise than by its file, as when a command runs a script."""
    global _program
    _program = name


def program() -> str:
    """The program's name, which begins messages."""
    return _program or Path(sys.argv[0]).name


def nearest(name: str, names: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or nothing where no name is near."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _wants_traceback() -> bool:
    """Whether `SEEUPO_TRACEBACK` asks for tracebacks of mistakes, too."""
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def is_mistake(error: BaseException) -> bool:
    """
    Whether an error is the user's: a [`UsageError`], a missing package, a wrong value that this package, a script or
    TRL refuses, a file that they miss, or a model that transformers does not find.
    """
    if isinstance(error, UsageError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] != "seeupo_trl"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not (frames[-1].line or "").startswith("raise "):
        return False
    origin = Path(frames[-1].filename).resolve()
    if isinstance(error, ImportError):
        return True
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return any(origin.is_relative_to(directory) for directory in _OURS) or "trl" in origin.parts
    # a missing model is an `OSError` without the number that the operating system gives its own
    return isinstance(error, OSError) and error.errno is None and "transformers" in origin.parts


@contextmanager
def reported() -> Iterator[None]:
    """Report mistakes in the block without a traceback and leave with exit code 2; let all other errors through."""
    try:
        yield
    except Exception as error:
        if _wants_traceback() or not is_mistake(error):
            raise
        _report(error)
        sys.exit(EXIT_CODE)


def _report(error: Exception) -> None:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and os.environ.get("LOCAL_RANK") != "0":
        # most mistakes are the same in all processes; the launcher ends this one when the first one has said it
        time.sleep(SECONDS_FOR_THE_FIRST)
    process = f"[process {os.environ.get('RANK')}] " if several else ""
    hint = "" if isinstance(error, UsageError) else f"\n({TRACEBACK_VARIABLE}=1 shows where this was raised.)"
    print(f"{process}{program()}: error: {str(error).rstrip()}{hint}", file=sys.stderr, flush=True)
