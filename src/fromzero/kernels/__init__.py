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
import torch.nn.functional as F
from torch import Tensor

from fromzero import files
from fromzero.errors import FromzeroError
from fromzero.kernels.functions import BatchNorm, Convolve3x3, ConvolveDirectly, Drop, MaxPool2x2, Pooled
from fromzero.kernels.interface import ACTIVATIONS, DIRECT_CHANNELS, Kernels, Mask
from fromzero.rng import random_bytes, words

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
# Of the check, over the largest value. Errors are a tenth of it.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

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


def agrees(kernels: Kernels) -> bool:
    """Whether every kernel, on a small map, computes what PyTorch does."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        element, draws = kernels.element, torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.rand(shape, generator=draws, dtype=torch.float32, device="cpu") - 0.5

        def of(result: Tensor, gradient: Tensor, *leaves: Tensor) -> list[Tensor]:
            """Gradients of a sum, since a gradient handed to autograd imports sympy: a second at the start of a run."""
            total = (result * gradient.float().permute(0, 3, 1, 2)).sum()
            return list(torch.autograd.grad(total, leaves, retain_graph=True))

        x, filters, bias = drawn(3, 7, 6, 33).to(element), drawn(19, 3, 3, 33), drawn(19)
        gradient, of_pool = drawn(3, 7, 6, 19).to(element), drawn(3, 3, 3, 33).to(element)
        leaf, leaf_filters = (t.float().permute(0, 3, 1, 2).detach().requires_grad_() for t in (x, filters))
        shift = drawn(33).requires_grad_()
        image, few = drawn(3, 9, 6, 3).to(element), drawn(19, 3, 3, 3)
        leaf_image, leaf_few = (t.float().permute(0, 3, 1, 2).detach().requires_grad_() for t in (image, few))
        of_image = drawn(3, 9, 6, 19).to(element)
        rectified, _ = kernels.forward_directly(image, few, bias, 1, pooled=False, relu=True)
        of_few, of_bias = kernels.gradients_directly(image, of_image, 1, rectified, None)
        pooled = kernels.max_pool(x, relu=True)
        mean, variance = kernels.moments(x)
        normal = mean, (variance + 1e-5).rsqrt(), shift.detach(), "gelu"
        added = drawn(*x.shape).to(element)
        rectifying = *normal[:3], "relu"
        of_joined, of_joined_shift, of_added = kernels.normalise_gradient(x, x, *rectifying, added)
        assert of_added is not None
        leaf_added = added.float().permute(0, 3, 1, 2).detach().requires_grad_()
        mask = Mask(64, 2**63 - 5, 3)
        key = torch.tensor(words(mask.key), dtype=torch.int32, device="cpu")
        kept = (random_bytes(key, mask.layer, x.numel()) >= mask.threshold).to(torch.float32) / 0.75
        convolved, picked = kernels.forward_pooled(x, filters, bias, 1, relu=True, mask=mask)
        of_convolved = drawn(*convolved.shape).to(element)
        small, of_small = drawn(5, 2, 2, 33).to(element), drawn(5, 2, 2, 19).to(element)
        leaf_small = small.float().permute(0, 3, 1, 2).detach().requires_grad_()
        many, of_many = drawn(260, 3, 3, 128).to(element), drawn(260, 3, 3, 128).to(element)
        # Of so many tiles and channels the filters' gradient is computed in another way, position by position.
        leaf_many = torch.zeros(128, 128, 3, 3, dtype=torch.float32, device="cpu", requires_grad=True)
        # A gradient as the pooling hands it back: the pooled map's, where it was picked.
        places = (picked[..., None] == torch.arange(4, device="cpu")) * of_convolved[..., None]
        spread = torch.zeros_like(gradient)
        spread[:, :6] = 1 / 0.75 * places.unflatten(-1, (2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
        moved, momenta = drawn(1, 1, 5, 33), drawn(1, 1, 5, 33)
        of_moved = drawn(*moved.shape).to(element)
        step = 0.9 * momenta + (of_moved.float() + 0.1 * moved)
        there = moved - 0.5 * (step * 0.9 + of_moved.float() + 0.1 * moved)
        kernels.descend(moved, of_moved, momenta, 0.5, 0.9, 0.1, nesterov=True)
        adapted, means, squares = drawn(1, 1, 5, 33), drawn(1, 1, 5, 33), drawn(1, 1, 5, 33) + 0.5
        new_means, new_squares, placed = means, squares, adapted
        for betas, decay, decoupled in (((0.9, 0.99), 0.1, False), ((0.4, 0.9), 0.1, True)):
            along = of_moved.float() + (0 if decoupled else decay * placed)
            new_means = betas[0] * new_means + (1 - betas[0]) * along
            new_squares = betas[1] * new_squares + (1 - betas[1]) * along**2
            root = (new_squares / (1 - betas[1] ** 3)).sqrt() + 0.1
            placed = placed * (1 - 0.5 * decay * decoupled) - 0.5 * new_means / (1 - betas[0] ** 3) / root
            kernels.adapt(adapted, of_moved, means, squares, 3, 0.5, *betas, 0.1, decay, decoupled)
        pixels = (255 * (drawn(1, 3, 7, 3) + 0.5)).to(torch.uint8)
        rows, columns = (torch.tensor(places, device="cpu") for places in ([[8, 0]] * 2, [[5, 5, 1], [2, 0, 3]]))
        bytes_ = (255 * (image.float() + 0.5)).to(torch.uint8)
        which = torch.tensor([2, 1], device="cpu")
        large = drawn(5000)
        large[4998] = -2.0
        found = [
            float(kernels.within(large[:count], limit)) for count, limit in ((4998, 1.0), (4999, 1.0), (4999, 2.0))
        ]
        whole = bytes_.long()
        sums = torch.stack([whole.sum((0, 1, 2)), whole.square().sum((0, 1, 2))])
        found.append(float(torch.equal(kernels.byte_sums(bytes_), sums)))
        ours = (
            torch.tensor(found, device="cpu").expand(1, 1, 1, -1),
            kernels.normalise_pixels(pixels, bias[:3], bias[3:6]),
            kernels.gather(bytes_, which, rows, columns),
            kernels.convolve_pixels(image.float(), few.permute(1, 2, 3, 0).contiguous(), "gelu"),
            moved,
            momenta,
            adapted,
            means,
            squares,
            kernels.orthogonalise(filters.flatten(1), (3.0, -4.0, 2.0), 2).expand(1, 1, -1, -1),
            kernels.forward(x, filters, bias, 1),
            kernels.input_gradient(gradient, filters, 1, x.shape),
            kernels.filter_gradient(x, gradient, 1).permute(0, 2, 3, 1),
            pooled,
            kernels.max_pool_gradient(x, pooled, of_pool, relu=True),
            kernels.channel_sums(x).expand(1, 1, 1, -1),
            convolved,
            kernels.input_gradient(of_convolved, filters, 1, x.shape, picked, mask.threshold),
            kernels.filter_gradient(x, of_convolved, 1, picked, mask.threshold).permute(0, 2, 3, 1),
            kernels.channel_sums(of_convolved, picked, mask.threshold).expand(1, 1, 1, -1),
            kernels.normalise(x, *normal),
            kernels.normalise_gradient(x, x, *normal)[0],
            kernels.normalise(x, *rectifying, added),
            of_joined,
            of_added,
            of_joined_shift.expand(1, 1, 1, -1),
            kernels.drop(x, mask),
            kernels.forward(small, filters, bias, 1),
            kernels.input_gradient(of_small, filters, 1, small.shape),
            kernels.filter_gradient(small, of_small, 1).permute(0, 2, 3, 1),
            kernels.filter_gradient(many, of_many, 1).permute(0, 2, 3, 1),
            rectified,
            kernels.forward_directly(image, few, bias, 1, pooled=True, relu=False)[0],
            of_few.permute(0, 2, 3, 1),
            of_bias.expand(1, 1, 1, -1),
        )
        y = F.conv2d(leaf, leaf_filters, bias, padding=1)
        normalised = (pixels.float() - bias[:3]) * bias[3:6]
        gathered = bytes_[which[:, None, None], rows[:, :, None], columns[:, None]].float()
        theirs = [t.permute(0, 3, 1, 2) for t in (normalised, gathered, there, step, placed, new_means, new_squares)]
        theirs.insert(2, F.gelu(F.conv2d(leaf_image, leaf_few)))
        theirs.insert(0, torch.tensor([1.0, 0.0, 1.0, 1.0], device="cpu").view(1, 4, 1, 1))
        matrix = filters.flatten(1) / filters.norm()
        for _ in range(2):
            square = matrix @ matrix.T
            matrix = 3 * matrix - 4 * square @ matrix + 2 * square @ square @ matrix
        theirs += [matrix.expand(1, 1, -1, -1).permute(0, 3, 1, 2), y, *of(y, gradient, leaf, leaf_filters)]
        z = F.relu(F.max_pool2d(leaf, 2))
        theirs += [z, *of(z, of_pool, leaf), leaf.sum((0, 2, 3), keepdim=True)]
        kept_pooled = kept[: convolved.numel()].view(convolved.shape).permute(0, 3, 1, 2)
        theirs += [F.relu(F.max_pool2d(y, 2)) * kept_pooled, *of(y, spread, leaf, leaf_filters)]
        theirs.append(spread.float().sum((0, 1, 2)).view(1, -1, 1, 1))
        even = F.batch_norm(leaf, None, None, None, shift, training=True, eps=1e-5)
        z, joined = F.gelu(even), F.relu(even + leaf_added)
        *of_leaves, of_shift = of(joined, x, leaf, leaf_added, shift)
        theirs += [z, *of(z, x, leaf), joined, *of_leaves, of_shift.view(1, -1, 1, 1)]
        theirs += [leaf * kept.view(x.shape).permute(0, 3, 1, 2)]
        y = F.conv2d(leaf_small, leaf_filters, bias, padding=1)
        theirs += [y, *of(y, of_small, leaf_small, leaf_filters)]
        theirs += of(F.conv2d(many.float().permute(0, 3, 1, 2), leaf_many, padding=1), of_many, leaf_many)
        y = F.conv2d(leaf_image, leaf_few, bias, padding=1)
        of_y = of_image * (rectified > 0)
        theirs += [F.relu(y), F.max_pool2d(y, 2), *of(y, of_y, leaf_few)]
        theirs.append(of_y.float().sum((0, 1, 2)).view(1, -1, 1, 1))
        return all(
            bool((a.float() - b.detach().permute(0, 2, 3, 1)).abs().max() <= TOLERANCE[element] * b.abs().max())
            for a, b in zip(ours, theirs, strict=True)
        )


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
