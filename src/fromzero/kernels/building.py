"""Compiling the kernels on this machine, and finding what was compiled before.

Their C source lies beside this file. It is compiled by the machine's own C compiler the first time it is needed,
checked against PyTorch, and kept under `FROMZERO_HOME`. What was made has a name, a digest of source, compiler, options
and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fromzero import files
from fromzero.kernels.agreement import agrees
from fromzero.kernels.interface import Kernels

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
INSTRUCTIONS = re.compile(r"\b(?:s?sse|avx|amx|fma|bmi|f16c|abm|lzcnt|popcnt|movbe|adx|gfni|vaes|vpclmul)\w*")  # of x86


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
    return made(element)


@cache
def made(element: torch.dtype) -> Made:
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
            try:
                kernels = _compiled(compiler, flags, _writable(folder) or Path(nowhere), digest, element)
            except (OSError, subprocess.CalledProcessError) as error:
                if not _is_full(error):
                    raise
                kernels = _compiled(compiler, flags, Path(nowhere), digest, element)
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


def _is_full(error: OSError | subprocess.CalledProcessError) -> bool:
    """Whether a disk is, by what the system or a compiler says."""
    said = str(error.stderr if isinstance(error, subprocess.CalledProcessError) else error).lower()
    return "space left" in said or "quota" in said


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> str:
    """What the compiler's choice of instructions depends on; not what else an update of the system adds to the list."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() + platform.version()
    kept = [line for line in lines if line.startswith(("model name", "Features"))]
    kept += [" ".join(INSTRUCTIONS.findall(line)) for line in lines if line.startswith("flags")]
    return "\n".join(dict.fromkeys(kept))
