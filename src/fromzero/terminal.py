"""Lines on a terminal, in a file or in a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from fromzero.errors import counted, printable

REFRESH_SECONDS = 0.25  # of a live display
LINE_SECONDS = 30.0  # without a terminal: the longest time without a line while work is done


def say(console: Console, text: str) -> None:
    """Print text as it is, but for what would move the cursor; in a file or a pipe a line stays a line."""
    console.print(printable(text), highlight=False, soft_wrap=not can_redraw(console), markup=False)


def can_redraw(console: Console) -> bool:
    """Whether lines can be written over: not in a file, a pipe or a terminal that calls itself dumb."""
    return console.is_terminal and not console.is_dumb_terminal


def bars(console: Console, bar_width: int | None = 40, *, with_bar: bool = True) -> Progress:
    """A live line for each task: its description, perhaps a bar (of any width: None), and its field `info`."""
    line = Column(no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        *([BarColumn(bar_width)] if with_bar else []),
        TextColumn("{task.fields[info]}", table_column=line),
        console=console,
        transient=True,
        auto_refresh=False,
    )


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def in_brackets(interval: tuple[float, float], images: int) -> str:
    """An interval of an accuracy in words: `0.7403–0.7669, 95 % for 4,000 images`."""
    return f"{interval[0]:.4f}–{interval[1]:.4f}, 95 % for {counted(images, 'image')}"


class _Lasting:
    """A stream that goes on in silence once it cannot be written to."""

    def __init__(self, stream: TextIO):
        self._stream, self._lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            do()
        except OSError as error:
            self._lost = True
            print_no_more()
            if not isinstance(error, BrokenPipeError):  # whoever read our output has left
                warnings.warn(f"output: {error.strerror}; nothing more is printed", stacklevel=2)


def lasting_console() -> Console:
    """Of standard output, for work that is no less worth when nobody reads of it: a terminal that has gone or a full
    disk ends what is printed, not a training."""
    return Console(file=cast(TextIO, _Lasting(sys.stdout)), emoji=False)  # of :dog: in a name none is made


def print_no_more() -> None:
    """Send what is still printed to nowhere, so that it cannot fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
