"""Kernels that are compiled for this processor: 3×3 convolutions by Winograd's method, up to twice as fast as oneDNN's,
those of an image's few channels directly, with the pooling behind them; pooling with the ReLU behind it; dropout;
batch normalisation with a residual sum and the activation behind it; a whitening layer; steps of Muon, Adam and SGD; a
batch's pixels.

Where none could be made (`building`), PyTorch's own are used: the same functions, other bits. So what is used has a
name, and `Machine` records it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fromzero.errors import FromzeroError
from fromzero.kernels import building
from fromzero.kernels.agreement import agrees
from fromzero.kernels.building import NONE, Made, find
from fromzero.kernels.functions import BatchNorm, Convolve3x3, ConvolveDirectly, Drop, MaxPool2x2
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
    "agrees",
    "byte_sums",
    "find",
    "gather",
    "in_use",
    "normalise_pixels",
    "use",
    "within",
]


class _Chosen(threading.local):
    """The kernels by which a thread computes: those it chose, else those that were chosen last when it began."""

    last: ClassVar[Kernels | None] = None

    def __init__(self) -> None:
        self.kernels = _Chosen.last

    def choose(self, kernels: Kernels | None) -> None:
        self.kernels = _Chosen.last = kernels


_chosen = _Chosen()


def use(name: str, element: torch.dtype) -> None:
    """From now on compute in `element` by the kernels of that name, and in other types by PyTorch's; NONE: all by
    PyTorch's; in this thread, as another one may compute in another type. Raises FromzeroError where those kernels are
    not."""
    found = building.Made(NONE, None) if name == NONE else building.made(element)
    if name != found.name:
        _chosen.choose(None)
        raise FromzeroError(f"the kernels {name} are not on this machine; it has: {found.name}")
    _chosen.choose(found.kernels)


def in_use(x: Tensor) -> Kernels | None:
    """The kernels that compute on `x`, if any: those of the type that autocast would give it. None while the network is
    traced or exported: they are no operations that could be recorded."""
    if x.device.type != "cpu" or x.dtype == torch.float64:  # which autocast leaves as it is
        return None
    if torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter):  # such as a FakeTensor, without memory
        return None
    kernel, dtype = _chosen.kernels, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return kernel if kernel is not None and kernel.element == dtype else None


def within(tensors: Iterable[Tensor], limit: float) -> bool:
    """Whether no value of any of them is NaN or beyond ± limit."""
    kernel = _chosen.kernels
    rest: list[Tensor] = []
    for x in tensors:
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        if kernel is None or x.device.type != "cpu" or x.dtype not in (torch.float32, kernel.element) or not dense:
            rest.append(x)
        elif not kernel.within(x, limit):
            return False
    if not rest:
        return True
    by_type = [[x for x in rest if x.dtype == dtype] for dtype in {x.dtype for x in rest}]  # of one type it is one pass
    largest = [value.float() for part in by_type for value in torch._foreach_norm(part, math.inf)]
    return bool((torch.stack(largest) <= limit).all())


def gather(pixels: Tensor, indices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """uint8 (B, H', W', C): of each of the images at `indices` (B,) of `pixels` uint8 (N, H, W, C), the pixels where
    its rows and columns meet, int64 (B, H') and (B, W'); all on one device."""
    if kernel := _of_bytes(pixels):
        return kernel.gather(pixels, indices.contiguous(), rows.contiguous(), columns.contiguous())
    base = (indices[:, None] * pixels.shape[1] + rows) * pixels.shape[2]
    return pixels.reshape(-1, pixels.shape[3])[base[:, :, None] + columns[:, None, :]]


def byte_sums(pixels: Tensor) -> Tensor:
    """int64 (2, C): of each channel of `pixels` uint8 (N, H, W, C) the sum, and the sum of squares. Whole numbers, so
    they are the same by whatever they are computed."""
    if kernel := _of_bytes(pixels):
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
    fits = all(x.dtype == torch.float32 and x.shape == pixels.shape[-1:] for x in (shift, scale))
    if (kernel := _of_bytes(pixels)) and fits:
        return kernel.normalise_pixels(pixels, shift, scale)
    width = pixels.shape[2]
    rows = pixels.float().flatten(2)  # (N, H, W·C): a vector is as long as a row, not as a pixel
    return (rows - shift.repeat(width)).mul_(scale.repeat(width)).view(pixels.shape)


def _of_bytes(pixels: Tensor) -> Kernels | None:
    """The kernels that read these bytes, if any: in whatever type they compute, that of bytes is the same."""
    readable = pixels.device.type == "cpu" and pixels.is_contiguous() and pixels.dtype == torch.uint8
    return _chosen.kernels if readable else None
