"""Picture files as small RGB images of one size, or why they are none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from fromzero.errors import one_line
from fromzero.resources import num_threads

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # other decoders are not tried on anybody's file
UNREADABLE_NAMED = 50  # so that all can be removed before the next try


class Wrong(NamedTuple):
    """Why a picture cannot be read, and whether its contents are to blame: anything else may pass."""

    why: str
    damaged: bool


Picture = Path | bytes | BinaryIO | Image.Image  # a file, what is in one, one that is open, or what Pillow has read
_Outcome = tuple[np.ndarray, int] | Wrong  # pixels and digest of a file, or what is wrong with it


def read_pictures(
    pictures: Sequence[Picture], height: int, width: int, doing: str
) -> tuple[np.ndarray, np.ndarray, dict[int, Wrong]]:
    """These pictures, cut to their middle and scaled: RGB pixels uint8 (N, height, width, 3); uint64 (N,),
    eight bytes of each file's SHA-256; and what is wrong with those that cannot be read, by their place, where the rest
    is zeros. `doing` is what a terminal shows meanwhile."""
    pixels, digests = np.zeros((len(pictures), height, width, 3), np.uint8), np.zeros(len(pictures), np.uint64)
    wrong: dict[int, Wrong] = {}
    with pool_of_threads() as pool:
        found = pool.map(lambda picture: _decode(picture, width, height), pictures)
        for index, outcome in enumerate(_watched(found, len(pictures), doing)):
            if isinstance(outcome, Wrong):
                wrong[index] = outcome
            else:
                pixels[index], digests[index] = outcome
    return pixels, digests, wrong


def unreadable(paths: Sequence[Path], wrong: Mapping[int, Wrong]) -> str:
    """What `read_pictures` found wrong, in words: the first files by name, after what they have in common."""
    named: dict[str, list[str]] = {}
    for index in list(wrong)[:UNREADABLE_NAMED]:
        named.setdefault(wrong[index].why, []).append(one_line(str(paths[index])))
    reasons = [f"{why}: {', '.join(files)}" for why, files in named.items()]
    if len(wrong) > UNREADABLE_NAMED:
        reasons.append(f"and {len(wrong) - UNREADABLE_NAMED} more")
    of = "1 picture" if len(paths) == 1 else f"{len(paths):,} pictures"
    return f"{len(wrong)} of {of} cannot be read ({'; '.join(reasons)})"


@contextlib.contextmanager
def pool_of_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that decode, stopped with what they have not begun when anything stops the one that waits for them."""
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads()) as pool:
        warnings.simplefilter("ignore")  # of large pictures, odd metadata: what cannot be read is an error of its own
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _watched(found: Iterable[_Outcome], count: int, doing: str) -> Iterable[_Outcome]:
    """The same, on a terminal with a bar while it lasts."""
    console = Console(stderr=True, emoji=False)
    quiet = not console.is_terminal
    return track(found, escape(doing), count, console=console, transient=True, disable=quiet)


def size_of_picture(path: Path) -> tuple[int, int] | None:
    """Width and height as the picture is meant to be looked at; None where that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
            # Pillow turns a TIFF itself, and decodes the whole of a PNG to look for what it mostly has not.
            looked_for = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            with contextlib.suppress(Exception):  # damaged EXIF data turn nothing
                if looked_for and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                    size = size[::-1]
            return size
    except Exception:  # decoders raise all kinds of errors at damaged files; `_decode` says which
        return None


def preparation(height: int, width: int) -> str:
    """How pictures become pixels of that size, for those who prepare them elsewhere."""
    draft = f"draft('RGB', ({2 * width}, {2 * height}))"
    return (
        f"RGB, a JPEG of {4 * width}×{4 * height} or more decoded smaller by Pillow's {draft}, turned as EXIF says, on"
        " white where transparent, cut to the largest part in the middle of the same shape, scaled by Pillow's Lanczos"
        f" to {width}×{height}"
    )


def _turn(image: Image.Image) -> None:
    """As its EXIF says; damaged EXIF data turn nothing."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # of all kinds, in a picture that is whole
        return


def _content(picture: Picture) -> bytes:
    """The bytes of a file, or of an image's pixels. Raises OSError, and ValueError of what is closed."""
    match picture:
        case Path():
            return picture.read_bytes()
        case bytes():
            return picture
        case Image.Image():
            return picture.tobytes()
    return picture.read()


def _decode(picture: Picture, width: int, height: int) -> _Outcome:
    """RGB pixels uint8 (height, width, 3), from the middle of the picture and on white where it is transparent, and
    eight bytes of the file's SHA-256 as a number; or what is wrong."""
    try:
        content = _content(picture)
    except OSError as error:
        return Wrong(error.strerror or type(error).__name__, damaged=False)
    except ValueError as error:
        return Wrong(str(error), damaged=False)
    try:
        read = picture.copy() if isinstance(picture, Image.Image) else None
        with read or Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.draft("RGB", (2 * width, 2 * height))  # a large JPEG is not decoded in full only to be made small
            image.load()
            _turn(image)
            if image.mode.startswith(("I", "F")):
                return Wrong("more than 8 bits a channel", damaged=True)
            if image.has_transparency_data:
                over = image.convert("RGBA")
                plain = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
            else:
                plain = image.convert("RGB")
            if plain.size != (width, height):
                plain = ImageOps.fit(plain, (width, height), Image.Resampling.LANCZOS)
            return np.asarray(plain), int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        return Wrong("too many pixels to be safely decoded", damaged=True)
    except UnidentifiedImageError:
        return Wrong(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}" if content else "empty", damaged=True)
    except Exception as error:  # whatever decoders raise at damaged files
        return Wrong(" ".join(str(error).split())[:120] or type(error).__name__, damaged=True)
