"""What goes wrong in ways a user can mend.

Every error here is one line that names what, where and what to do (a table may follow). The command line prints it and
leaves with `exit_code`; nothing else is ever shown for bad input. Imports nothing of fromzero.
"""

import errno
import inspect
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path, PurePath
from typing import Any, ParamSpec, TypeVar
from unicodedata import category

P = ParamSpec("P")
R = TypeVar("R")


class FromzeroError(Exception):
    """Something the user can mend; the message is one line that says how."""

    exit_code = 1


class InputError(FromzeroError):
    """A name, field, value or file that does not fit: nothing was started."""

    exit_code = 2


class TooLargeError(InputError):
    """What would not fit into the memory that is free; nothing was changed."""


class BusyError(FromzeroError):
    """Another process writes to the run; when it has ended, this one can."""


class ReadError(InputError):
    """A file that is there could not be read, as when too many are open: it may be the next time."""


def is_passing(error: OSError) -> bool:
    """Whether what could not be opened or read may be the next time."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)


class WriteError(FromzeroError):
    """A run's record could not be written, as on a full disk; what was there before is whole."""


class NonFiniteError(FromzeroError):
    """A loss or gradient became infinite or NaN. In a step the weights are left as they were."""


class StoppedError(KeyboardInterrupt):
    """The run was asked to stop, and has been saved, to be resumed, or has just ended. Like any Ctrl-C it passes what
    catches errors, so that a loop over trainings ends. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)  # both, so that it can be pickled
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return str(self.args[0])


def _as_path(value: Any) -> Any:
    """Whatever stands for a path as one."""
    return Path(value) if isinstance(value, os.PathLike) and not isinstance(value, Path) else value


def checking_types(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which refuses what is of other types than its parameters' by an InputError that names them. What
    can be made one without loss is, as numpy's numbers can."""
    import pydantic  # which takes a while, and whoever asks for help needs none

    checked = pydantic.validate_call(config=pydantic.ConfigDict(arbitrary_types_allowed=True))(function)
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:  # there is no such parameter, or none is given
            raise TypeError(f"{function.__name__}() {error}") from None
        try:
            return checked(*map(_as_path, args), **{name: _as_path(value) for name, value in kwargs.items()})
        except pydantic.ValidationError as error:
            place = error.errors()[0]["loc"][0]
            name = [*signature.parameters][place] if isinstance(place, int) else place
            found, shown = type(given[name]).__name__, " ".join(repr(given[name]).split())
            expected = function.__annotations__[name]
            raise InputError(f"{name}: expected {expected}, found {found} {shown:.60}") from None

    return call


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; nearest: …"` with the known name most like `name` (initials count: `lr` → `learning_rate`), or all of
    them when none is near and they are few."""
    names = list(known)
    leaf = name.rpartition(".")[2]
    initials = [k for k in names if leaf and leaf == "".join(w[0] for w in k.rpartition(".")[2].split("_") if w)]
    of_leaf = {k.rpartition(".")[2]: k for k in reversed(names)}
    close = get_close_matches(name, names, n=1) or [of_leaf[k] for k in get_close_matches(leaf, of_leaf, n=1)]
    if found := initials or close:
        return f"; nearest: {found[0]}"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def command_line(*words: str | PurePath) -> str:
    """A command line to be typed. Paths have slashes, which Windows takes too: backslashes would need quotes, which its
    own shell does not know."""
    return shlex.join(word.as_posix() if isinstance(word, PurePath) else word for word in words)


def options_typed(options: Mapping[str, object]) -> list[str]:
    """The words of these options on a command line: those that are None or False are left out, of True only the name
    stays."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return [
        word.as_posix() if isinstance(word, PurePath) else str(word)
        for name, value in given.items()
        for word in ((name,) if value is True else (name, value))
    ]


def printable(text: str) -> str:
    """Lines without what would move a terminal's cursor or colour it, as names of files can."""

    def is_shown(letter: str) -> bool:
        return letter.isprintable() or letter == "\n" or category(letter) == "Zs"  # of any width: part of a name

    return "".join(letter if is_shown(letter) else ascii(letter)[1:-1] for letter in text)


def one_line(name: str) -> str:
    """A name, as of a file, that is to stay within its line."""
    return name.replace("\n", "\\n")


def some(names: Sequence[str], between: str = ", ", most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f"{'' if between == ', ' else between.rstrip()} and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
