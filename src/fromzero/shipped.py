"""The recipes and studies that come with fromzero, and a user's own: TOML files, found by name or by path."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fromzero.errors import InputError, ReadError, is_passing, nearest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Kind = Literal["recipe", "study"]


def names_of(kind: Kind) -> list[str]:
    """Names of those that come with fromzero."""
    return sorted(f.name.removesuffix(".toml") for f in _folder(kind).iterdir() if f.name.endswith(".toml"))


def text_of(kind: Kind, source: str | Path) -> str:
    """The TOML of the one of that name, or in that file. Raises InputError where it cannot be read."""
    name = str(source)
    if name in names_of(kind):
        return (_folder(kind) / f"{name}.toml").read_text("utf-8")
    path = Path(source)
    if path.suffix == ".toml" or os.path.isfile(path):
        try:
            return path.read_text("utf-8-sig")  # some editors begin a file with a mark
        except ValueError as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise InputError(f"{kind} file {name!r}: {reason}") from None
        except OSError as error:
            what = ReadError if is_passing(error) else InputError
            raise what(f"{kind} file {name!r}: {error.strerror}") from None
    if kind == "recipe" and os.path.isfile(path / "recipe.toml"):
        raise InputError(f"{name!r} is the folder of a run; for its recipe give {path / 'recipe.toml'}")
    raise InputError(f"unknown {kind} {name!r}{nearest(name, names_of(kind))} (or give a .toml file)")


def _folder(kind: Kind) -> Traversable:
    return resources.files("fromzero") / {"recipe": "recipes", "study": "studies"}[kind]
