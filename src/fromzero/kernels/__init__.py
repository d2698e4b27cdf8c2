"""Kernels that are compiled for this processor: 3×3 convolutions by Winograd's method, up to twice as fast as oneDNN's,
those of an image's few channels directly, with the pooling behind them; pooling with the ReLU behind it; batch
normalisation with a residual sum and the activation behind it; a whitening layer; Muon's steps and those of SGD; a
batch's pixels.

Their C source lies beside this file. It is compiled by the machine's own C compiler the first time it is needed,
checked against PyTorch, and kept under `FROMZERO_HOME`. Where there is no compiler, or what it made computes anything
else, PyTorch's own are used: the same functions, other bits. So what is used has a name, and `Machine` records it.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fromzero import files
from fromzero.errors import FromzeroError
from fromzero.kernels.agreement import agrees
from fromzero.kernels.functions import BatchNorm, Convolve3x3, ConvolveDirectly, Drop, MaxPool2x2, Pooled
from fromzero.kernels.interface import ACTIVATIONS, DIRECT_CHANNELS, Kernels, Mask

__all__ = [
    "ACTIVATIONS",
    "DIRECT_CHANNELS",
    "NONE",
    "BatchNorm",
    "Convolve3x3",
    "ConvolveDirectly",
    "Drop",
    "Kernels",
    "Made",
    "Mask",
    "MaxPool2x2",
    "Pooled",
    "agrees",
    "byte_sums",
    "find",
    "gather",
    "in_use",
    "normalise_pixels",
    "use",
    "within",
]

NONE = "none"
SOURCE_FOLDER = Path(__file__).parent
SOURCES = ("winograd.c", "direct.c", "pointwise.c", "orthogonal.c", "vectors.h", "products.h", "convolution.h")
# What objects are compiled from; winograd.c twice, the second time for maps of 2×2 pixels.
OBJECTS = (("winograd.c",), ("winograd.c", "-DSMALL"), ("direct.c",), ("pointwise.c",), ("orthogonal.c",))
# Compiled and linked apart, so that OpenMP is the one that torch has loaded, with its threads, and not a second.
# Apple's compiler knows OpenMP and says it does not; its linker wants to be told that something will be found later.
APPLE = sys.platform == "darwin"
COMPILE = ("-O3", *(("-Xclang", "-fopenmp") if APPLE else ("-fopenmp",)), "-fPIC", "-c")
LINK = ("-shared", "-undefined", "dynamic_lookup") if APPLE else ("-shared",)
# For this very processor; Apple's, which it calls arm64, has vectors of one width.
NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "arm64": "-mcpu=apple-m1"}  # elsewhere -mcpu=native
COMPILE_SECONDS = 60.0

_loaded: dict[torch.dtype, Kernels] = {}


class Made(NamedTuple):
    """The kernels for a type of element and their name; or NONE, and in a few words why there are none."""

    name: str
    kernels: Kernels | None
    why: str = ""


def find(element: torch.dtype) -> Made:
    """The kernels for `element` on this machine, made if need be."""
    if os.environ.get("FROMZERO_KERNELS") == "off":
        return Made(NONE, None, "FROMZERO_KERNELS is off")
    if os.name != "posix":
        return Made(NONE, None, "fromzero's are for Linux and macOS")
    return _made(element)


def use(name: str, element: torch.dtype) -> None:
    """From now on compute in `element` by the kernels of that name, and in other types by PyTorch's; NONE: all by
    PyTorch's. Raises FromzeroError where those kernels are not."""
    _loaded.clear()
    if name == NONE:
        return
    found = _made(element)
    if found.kernels is None or name != found.name:
        raise FromzeroError(f"the kernels {name} are not on this machine; it has: {found.name}")
    _loaded[element] = found.kernels


def in_use(x: Tensor) -> Kernels | None:
    """The kernels that compute on `x`, if any: those of the type that autocast would give it."""
    if x.device.type != "cpu" or x.dtype == torch.float64:  # which autocast leaves as it is
        return None
    return _loaded.get(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)


def within(tensors: Iterable[Tensor], limit: float) -> bool:
    """Whether no value of any of them is NaN or beyond ± limit."""
    kernel = next(iter(_loaded.values()), None)
    rest: list[Tensor] = []
    for x in tensors:
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        if kernel is None or x.device.type != "cpu" or x.dtype not in (torch.float32, kernel.element) or not dense:
            rest.append(x)
        elif not kernel.within(x, limit):
            return False
    if not rest:
        return True
    largest = torch._foreach_norm(rest, math.inf)
    return bool((torch.stack([value.float() for value in largest]) <= limit).all())


def gather(pixels: Tensor, indices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """uint8 (B, H', W', C): of each of the images at `indices` (B,) of `pixels` uint8 (N, H, W, C), the pixels where
    its rows and columns meet, int64 (B, H') and (B, W'); all on one device."""
    kernel = next(iter(_loaded.values()), None)
    if kernel is not None and pixels.device.type == "cpu" and pixels.is_contiguous():
        return kernel.gather(pixels, indices.contiguous(), rows.contiguous(), columns.contiguous())
    base = (indices[:, None] * pixels.shape[1] + rows) * pixels.shape[2]
    return pixels.reshape(-1, pixels.shape[3])[base[:, :, None] + columns[:, None, :]]


def byte_sums(pixels: Tensor) -> Tensor:
    """int64 (2, C): of each channel of `pixels` uint8 (N, H, W, C) the sum, and the sum of squares. Whole numbers, so
    they are the same by whatever they are computed."""
    kernel = next(iter(_loaded.values()), None)
    if kernel is not None and pixels.device.type == "cpu" and pixels.is_contiguous():
        return kernel.byte_sums(pixels)
    channels = pixels.shape[-1]
    sums = torch.zeros((2, channels), dtype=torch.int64, device=pixels.device)
    for part in pixels.split(500):  # as integers they take four times as much memory
        rows = part.flatten(2).flatten(0, 1).int()  # (N·H, W·C): a vector is as long as a row, not as a pixel
        for total, values in zip(sums, (rows, rows * rows), strict=True):
            total += values.sum(0).view(-1, channels).sum(0)
    return sums


def normalise_pixels(pixels: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(pixels - shift) × scale in float32, pixels uint8 (N, H, W, C), the others float32 (C,)."""
    kernel = next(iter(_loaded.values()), None)
    if kernel is not None and pixels.device.type == "cpu" and pixels.is_contiguous():
        return kernel.normalise_pixels(pixels, shift, scale)
    width = pixels.shape[2]
    rows = pixels.float().flatten(2)  # (N, H, W·C): a vector is as long as a row, not as a pixel
    return (rows - shift.repeat(width)).mul_(scale.repeat(width)).view(pixels.shape)


@cache
def _made(element: torch.dtype) -> Made:
    """The kernels for `element` by the first of the machine's compilers that makes some, unless one has done so
    before."""
    wanted = dict.fromkeys((os.environ.get("CC") or "cc", "gcc", "clang"))
    different: dict[str, str] = {}  # cc is gcc under another name, or clang
    for compiler in filter(None, map(shutil.which, wanted)):
        different.setdefault(os.path.realpath(compiler), compiler)
    failures: list[Made] = []
    for compiles in (False, True):
        for compiler in different.values():
            found = _made_by(compiler, element, compiles)
            if found.kernels:
                return found
            failures += [found] if compiles else []
    return failures[0] if failures else Made(NONE, None, "no C compiler was found")


def _made_by(compiler: str, element: torch.dtype, compiles: bool) -> Made:
    """What this compiler has made, or `compiles` now."""
    flags = [*COMPILE, NATIVE.get(platform.machine(), "-mcpu=native")]
    if element == torch.bfloat16:
        flags += ["-DBFLOAT16"] if _tiles_granted() else ["-DBFLOAT16", "-DNO_TILES"]
    try:
        _, _, version = _run([compiler, "--version"]).partition("\n")[0].partition(" ")  # the name is how it was called
        sources = [(SOURCE_FOLDER / name).read_text("utf-8") for name in SOURCES]
        identity = "\0".join([*sources, *flags, str(OBJECTS), *LINK, version, _processor()])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        folder = files.home() / "kernels"
        if not compiles:
            return Made(digest, _kept(folder, digest, element))
        with tempfile.TemporaryDirectory() as nowhere:
            kernels = _compiled(compiler, flags, _writable(folder) or Path(nowhere), digest, element)
        return Made(digest, kernels) if kernels else Made(NONE, None, f"what {compiler} made computes something else")
    except subprocess.TimeoutExpired:
        why = f"{compiler} gave no answer in {COMPILE_SECONDS:.0f} s"
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stderr or "").splitlines() if "error" in line.lower()]
        why = f"{compiler} failed{': ' + said[0].strip() if said else ''}"
    except (OSError, AttributeError) as error:
        why = f"{compiler}: {error}"
    return Made(NONE, None, why)


@cache
def _tiles_granted() -> bool:
    """Whether this process may compute in the tiles of AMX: Linux grants them on request, kills who does not ask."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XTILEDATA; an error where there is no AMX
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def _kept(folder: Path, digest: str, element: torch.dtype) -> Kernels | None:
    """Kernels that were compiled before. A damaged library is no reason to stop, and must not be loaded: its name holds
    the digest of its content."""
    for library in sorted(folder.glob(f"{digest}-*.so")):
        try:
            if library.stem == f"{digest}-{_content_digest(library)}" and agrees(kernels := Kernels(library, element)):
                return kernels
        except (OSError, AttributeError):
            continue
    return None


def _compiled(compiler: str, flags: list[str], folder: Path, digest: str, element: torch.dtype) -> Kernels | None:
    """Kernels compiled into `folder`; None where they compute something else than PyTorch."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        fresh = built(compiler, flags, Path(place))
        kernels = Kernels(fresh, element)
        if not agrees(kernels):
            return None
        os.replace(fresh, folder / f"{digest}-{_content_digest(fresh)}.so")
        return kernels


def built(compiler: str, flags: Iterable[str], folder: Path) -> Path:
    """The library, compiled and linked in `folder`. Raises subprocess.SubprocessError."""
    objects: list[str] = []
    library = folder / "kernels.so"
    for source, *more in OBJECTS:
        objects.append(str(folder / f"{len(objects)}.o"))
        _run([compiler, *flags, *more, str(SOURCE_FOLDER / source), "-o", objects[-1]])
    _run([compiler, *LINK, *objects, "-o", str(library)])
    return library


def _content_digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _run(command: list[str]) -> str:
    return subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMPILE_SECONDS,
        stdin=subprocess.DEVNULL,
    ).stdout


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> str:
    """What the compiler's choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() + platform.version()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
