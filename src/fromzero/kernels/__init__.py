"""Kernels that are compiled for this processor: 3×3 convolutions by Winograd's method, twice as fast as oneDNN's.

The C source lies beside this file. It is compiled by the machine's own C compiler the first time it is needed, checked
against PyTorch, and kept under `FROMZERO_HOME`. Where there is no compiler, or what it made computes anything else,
PyTorch's convolutions are used: the same function, other bits. So what is used has a name, and `Machine` records it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero import files

NONE = "none"
SOURCE = Path(__file__).with_name("winograd.c")
# Compiled and linked apart, so that OpenMP is the one that torch has loaded, with its threads, and not a second.
COMPILE = ("-O3", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared",)
NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native"}  # elsewhere -mcpu=native
COMPILE_SECONDS = 60.0
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.05,
}  # of the check, over the largest value; errors are a tenth of it

_loaded: dict[torch.dtype, Winograd] = {}


def find(element: torch.dtype) -> str:
    """The name of the kernels for `element` on this machine, made if need be; NONE where there are none."""
    if os.name != "posix" or os.environ.get("FROMZERO_KERNELS") == "off":
        return NONE
    return _made(element)[0]


def use(name: str, element: torch.dtype) -> None:
    """From now on compute convolutions in `element` by the kernels of that name; NONE: by PyTorch's."""
    _loaded.pop(element, None)
    if name != NONE and find(element) == name:
        _loaded[element] = _made(element)[1]  # type: ignore[assignment]


def winograd(element: torch.dtype) -> Winograd | None:
    """The kernels in use for `element`, if any."""
    return _loaded.get(element)


class Winograd:
    """3×3 convolutions of stride 1 with zero padding on images (N, H, W, C) of `element`; filters (O, 3, 3, C) are
    float32. All tensors are contiguous."""

    def __init__(self, library: Path, element: torch.dtype):
        """Raises OSError if the library cannot be loaded."""
        self.element = element
        self._call = ctypes.CDLL(str(library))
        for function, pointers, numbers, result in (
            ("transform_filters", 2, 3, None),
            ("transform_turned_filters", 2, 3, None),
            ("convolve", 5, 8, None),
            ("filter_gradient", 4, 7, None),
            ("filters_size", 0, 2, ctypes.c_long),
            ("convolve_scratch", 0, 3, ctypes.c_long),
            ("filter_gradient_scratch", 0, 7, ctypes.c_long),
        ):
            entry = getattr(self._call, function)
            entry.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_long] * numbers
            entry.restype = result

    def forward(self, x: Tensor, filters: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """x (N, H, W, C) → (N, H', W', O), H' = H + 2 padding - 2; bias float32 (O,) or None."""
        outputs, _, _, channels = filters.shape
        transformed = torch.empty(self._call.filters_size(channels, outputs))
        threads = torch.get_num_threads()
        self._call.transform_filters(filters.data_ptr(), transformed.data_ptr(), channels, outputs, threads)
        return self._convolve(x, transformed, bias, outputs, padding)

    def input_gradient(self, gradient: Tensor, filters: Tensor, padding: int) -> Tensor:
        """The gradient of `forward`'s x from that of its result."""
        outputs, _, _, channels = filters.shape
        transformed = torch.empty(self._call.filters_size(outputs, channels))
        threads = torch.get_num_threads()
        self._call.transform_turned_filters(filters.data_ptr(), transformed.data_ptr(), channels, outputs, threads)
        return self._convolve(gradient, transformed, None, channels, 2 - padding)

    def filter_gradient(self, x: Tensor, gradient: Tensor, padding: int) -> Tensor:
        """The gradient of `forward`'s filters, float32 (O, 3, 3, C), from that of its result."""
        sizes = (*x.shape, gradient.shape[3], padding, torch.get_num_threads())
        scratch = torch.empty(self._call.filter_gradient_scratch(*sizes))
        filters = torch.empty(gradient.shape[3], 3, 3, x.shape[3])
        self._call.filter_gradient(x.data_ptr(), gradient.data_ptr(), filters.data_ptr(), scratch.data_ptr(), *sizes)
        return filters

    def _convolve(self, x: Tensor, transformed: Tensor, bias: Tensor | None, outputs: int, padding: int) -> Tensor:
        images, height, width, channels = x.shape
        height_out, width_out = height + 2 * padding - 2, width + 2 * padding - 2
        threads = torch.get_num_threads()
        block = self._tiles_at_once(channels, images * -(-height_out // 4) * -(-width_out // 4), threads)
        scratch = torch.empty(self._call.convolve_scratch(channels, block, threads))
        y = torch.empty(images, height_out, width_out, outputs, dtype=self.element)
        self._call.convolve(
            x.data_ptr(),
            transformed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            *(images, height, width, channels, outputs, padding, block, threads),
        )
        return y

    def _tiles_at_once(self, channels: int, tiles: int, threads: int) -> int:
        """How many tiles are transformed before they are multiplied: so many that they stay in a core's cache, and
        that all threads have as much to do; a multiple of 6."""
        most = min(max(400_000 // (36 * max(channels, 16) * self.element.itemsize), 6), 24)
        rounds = -(-tiles // (most * threads))
        return -(-tiles // (rounds * threads * 6)) * 6


class Convolve3x3(torch.autograd.Function):
    """`F.conv2d(x, weight, bias, padding=padding)` for 3×3 filters, by `kernels`; x and result are (N, C, H, W) in
    channels-last memory and of the kernels' element type, weight and bias float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, kernels: Winograd) -> Tensor:
        images = x.to(kernels.element).permute(0, 2, 3, 1).contiguous()
        filters = weight.float().permute(0, 2, 3, 1).contiguous()
        ctx.save_for_backward(images, filters)
        ctx.padding, ctx.kernels, ctx.dtype = padding, kernels, x.dtype
        return kernels.forward(images, filters, bias, padding).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, filters = ctx.saved_tensors
        kernels, padding = ctx.kernels, ctx.padding
        gradient = gradients[0].to(kernels.element).permute(0, 2, 3, 1).contiguous()
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_x = kernels.input_gradient(gradient, filters, padding).permute(0, 3, 1, 2).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = kernels.filter_gradient(images, gradient, padding).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 1, 2), dtype=torch.float32)
        return of_x, of_weight, of_bias, None, None


@cache
def _made(element: torch.dtype) -> tuple[str, Winograd | None]:
    """Name and kernels for `element`, compiled unless they are there already; (NONE, None) where that fails."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return NONE, None
    flags = [*COMPILE, NATIVE.get(platform.machine(), "-mcpu=native")]
    if element == torch.bfloat16:
        flags.append("-DBFLOAT16")
    try:
        version = _run([compiler, "--version"]).splitlines()[0]
        identity = "\0".join([SOURCE.read_text("utf-8"), *flags, *LINK, version, _processor()])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        with tempfile.TemporaryDirectory() as nowhere:
            folder = _writable(files.home() / "kernels") or Path(nowhere)
            library = folder / f"winograd-{digest}.so"
            if library.exists():
                return f"winograd {digest}", Winograd(library, element)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                fresh = Path(place) / library.name
                _run([compiler, *flags, str(SOURCE), "-o", f"{fresh}.o"])
                _run([compiler, *LINK, f"{fresh}.o", "-o", str(fresh)])
                kernels = Winograd(fresh, element)
                if not agrees(kernels):
                    return NONE, None
                os.replace(fresh, library)
            return f"winograd {digest}", kernels
    except (OSError, subprocess.SubprocessError, AttributeError):
        return NONE, None


def agrees(kernels: Winograd) -> bool:
    """Whether a small convolution and its gradients come out as PyTorch's."""
    element = kernels.element
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(3, 7, 6, 33, generator=draws).to(element)
    filters, bias = torch.rand(19, 3, 3, 33, generator=draws) - 0.5, torch.rand(19, generator=draws)
    gradient = (torch.rand(3, 7, 6, 19, generator=draws) - 0.5).to(element)
    ours = (
        kernels.forward(x, filters, bias, 1),
        kernels.input_gradient(gradient, filters, 1),
        kernels.filter_gradient(x, gradient, 1),
    )
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = [t.detach().float().permute(0, 3, 1, 2).requires_grad_() for t in (x, filters)]
        y = F.conv2d(leaves[0], leaves[1], bias, padding=1)
        theirs = (y, *torch.autograd.grad(y, leaves, gradient.float().permute(0, 3, 1, 2)))
    return all(
        bool((a.float() - b.detach().permute(0, 2, 3, 1)).abs().max() <= TOLERANCE[element] * b.abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS, stdin=subprocess.DEVNULL
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
