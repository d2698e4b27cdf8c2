"""The compiled kernels' interface: each function of the C sources as a method on tensors."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fromzero import rng

ACTIVATIONS = ("", "relu", "gelu")  # in the order of pointwise.c
DIRECT_CHANNELS = 4  # the most that direct.c takes
ALIGNED = 16  # floats: each thread's scratch memory begins at a multiple of 64 bytes, as the kernels rely on


class Mask(NamedTuple):
    """What dropout keeps: those elements whose byte of `rng.random_bytes(key, layer)` is at least `threshold`."""

    threshold: int
    key: int
    layer: int


class Kernels:
    """The compiled functions. On images (N, H, W, C) of `element`: 3×3 convolutions of stride 1 with zero padding,
    filters (O, 3, 3, C) in float32; 2×2 max pooling; batch normalisation; dropout. On pixels, uint8: gathering,
    normalising, a first convolution. On weights: steps of SGD, Adam and Muon. All tensors are contiguous."""

    def __init__(self, library: Path, element: torch.dtype):
        """Raises OSError if the library cannot be loaded."""
        self.element = element
        self._call = ctypes.CDLL(str(library))
        self._scratch = threading.local()
        winograd: list[tuple[str, int, int, Any]] = [
            ("transform_filters", 2, 3, None),
            ("transform_turned_filters", 2, 4, None),
            ("convolve", 8, 10, None),
            ("filter_gradient", 6, 9, None),
            ("filters_size", 0, 2, ctypes.c_long),
            ("convolve_scratch", 0, 7, ctypes.c_long),
            ("filter_gradient_scratch", 0, 7, ctypes.c_long),
            ("filter_gradient_sums", 0, 7, ctypes.c_long),
        ]
        for function, pointers, numbers, result in (
            *winograd,
            *((function + "_small", *signature) for function, *signature in winograd),
            ("convolve_directly", 7, 9, None),
            ("gradients_directly", 8, 8, None),
            ("max_pool", 2, 6, None),
            ("max_pool_gradient", 4, 6, None),
            ("channel_sums", 4, 4, None),
            ("random_bytes", 1, 5, None),
            ("drop", 2, 6, None),
            ("moments", 4, 3, None),
            ("normalise", 6, 4, None),
            ("normalise_gradient", 10, 4, None),
            ("sgd_step", 5, 3, None),
            ("adam_step", 6, 2, None),
            ("gather", 5, 7, None),
            ("byte_sums", 3, 4, None),
            ("normalise_pixels", 4, 3, None),
            ("convolve_pixels", 4, 9, None),
            ("count_beyond", 3, 2, ctypes.c_long),
            ("orthogonalise", 4, 4, None),
            ("orthogonalise_scratch", 0, 2, ctypes.c_long),
            ("sums_scratch", 0, 1, ctypes.c_long),
            ("direct_scratch", 0, 5, ctypes.c_long),
            ("direct_sums", 0, 5, ctypes.c_long),
        ):
            entry = getattr(self._call, function)
            entry.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_long] * numbers
            entry.restype = result

    def forward(self, x: Tensor, filters: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """x (N, H, W, C) → (N, H', W', O), H' = H + 2 padding - 2; bias float32 (O,) or None."""
        images, height, width, _ = x.shape
        y = self._empty(images, height + 2 * padding - 2, width + 2 * padding - 2, len(filters))
        self._convolve(x, None, self._transformed(filters, x, padding), bias, y, None, padding)
        return y

    def forward_pooled(
        self, x: Tensor, filters: Tensor, bias: Tensor | None, padding: int, relu: bool, mask: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """`max_pool` of `forward`, with `mask` its `drop`, (N, H'/2, W'/2, O), and uint8 of the same shape: which
        pixel of its window it is, 0 to 3, or 4 where `relu` or `mask` has made a zero of it."""
        images, height, width, _ = x.shape
        y = self._empty(images, (height + 2 * padding - 2) // 2, (width + 2 * padding - 2) // 2, len(filters))
        picked = torch.empty(y.shape, dtype=torch.uint8, device="cpu")
        self._convolve(x, None, self._transformed(filters, x, padding), bias, y, picked, padding, relu, mask)
        return y, picked

    def input_gradient(
        self,
        gradient: Tensor,
        filters: Tensor,
        padding: int,
        of: torch.Size,
        picked: Tensor | None = None,
        threshold: int = 0,
    ) -> Tensor:
        """The gradient of x, of the shape `of`, from that of the result of `forward`, or, with `picked`, of
        `forward_pooled`; threshold: of its mask."""
        outputs, _, _, channels = filters.shape
        call = self._winograd(of[1], of[2], padding)
        transformed = _floats(call("filters_size")(outputs, channels))
        sizes = (channels, outputs, threshold, torch.get_num_threads())
        call("transform_turned_filters")(filters.data_ptr(), transformed.data_ptr(), *sizes)
        of_x = self._empty(*of)
        self._convolve(gradient, picked, transformed, None, of_x, None, 2 - padding)
        return of_x

    def filter_gradient(
        self, x: Tensor, gradient: Tensor, padding: int, picked: Tensor | None = None, threshold: int = 0
    ) -> Tensor:
        """The gradient of the filters, float32 (O, C, 3, 3) in channels-last memory, from that of the result, as
        `input_gradient`."""
        sizes, threads = (*x.shape, gradient.shape[3], padding), torch.get_num_threads()
        call = self._winograd(x.shape[1], x.shape[2], padding)
        kept = _floats(call("filter_gradient_sums")(*sizes, threads))
        own = self._own(call("filter_gradient_scratch")(*sizes, threads))
        shape = (gradient.shape[3], x.shape[3], 3, 3)
        filters = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
        tensors = (x, gradient, picked, filters, kept)
        call("filter_gradient")(*map(_pointer, tensors), *own, *sizes, threshold, threads)
        return filters

    def forward_directly(
        self, x: Tensor, filters: Tensor, bias: Tensor | None, padding: int, pooled: bool, relu: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` from at most DIRECT_CHANNELS channels, at least zero with `relu`; or `forward_pooled`."""
        images, height, width, _ = x.shape
        height, width = height + 2 * padding - 2, width + 2 * padding - 2
        size = (height // 2, width // 2) if pooled else (height, width)
        y = self._empty(images, *size, len(filters))
        picked = torch.empty(y.shape, dtype=torch.uint8, device="cpu") if pooled else None
        sizes = (*x.shape[1:], len(filters), padding)
        tensors = (x, filters, bias, y, picked, _floats(self._call.direct_sums(*sizes)))
        own, threads = self._own(self._call.direct_scratch(*sizes)), torch.get_num_threads()
        self._call.convolve_directly(*map(_pointer, tensors), *own, images, *sizes, relu, threads)
        return y, picked

    def gradients_directly(
        self, x: Tensor, gradient: Tensor, padding: int, y: Tensor | None, picked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of filters, as `filter_gradient`, and bias from that of the result of `forward_directly`.
        y: the result, where it is at least zero and not pooled."""
        images, outputs, channels = len(x), gradient.shape[3], x.shape[3]
        of_bias = _floats(outputs)
        of_filters = torch.empty(
            (outputs, channels, 3, 3), dtype=torch.float32, device="cpu", memory_format=torch.channels_last
        )
        sizes = (*x.shape[1:], outputs, padding)
        tensors = (x, gradient, y, picked, of_filters, of_bias, _floats(self._call.direct_sums(*sizes)))
        own, threads = self._own(self._call.direct_scratch(*sizes)), torch.get_num_threads()
        self._call.gradients_directly(*map(_pointer, tensors), *own, images, *sizes, threads)
        return of_filters, of_bias

    def max_pool(self, x: Tensor, relu: bool) -> Tensor:
        """The maximum of each 2×2 window, (N, H/2, W/2, C), at least zero with `relu`."""
        images, height, width, channels = x.shape
        y = self._empty(images, height // 2, width // 2, channels)
        self._call.max_pool(x.data_ptr(), y.data_ptr(), *x.shape, relu, torch.get_num_threads())
        return y

    def max_pool_gradient(self, x: Tensor, y: Tensor, gradient: Tensor, relu: bool) -> Tensor:
        """The gradient of `max_pool`'s x from that of its result y."""
        of_x = torch.empty_like(x)
        pointers = (x.data_ptr(), y.data_ptr(), gradient.data_ptr(), of_x.data_ptr())
        self._call.max_pool_gradient(*pointers, *x.shape, relu, torch.get_num_threads())
        return of_x

    def channel_sums(self, x: Tensor, picked: Tensor | None = None, threshold: int = 0) -> Tensor:
        """Sums over all but the last dimension, float32 (C,), of what `picked` does not say 4 of: the gradient of a
        bias, as `input_gradient`."""
        channels = x.shape[-1]
        sums, parts = _floats(channels), _floats(self._call.sums_scratch(channels))
        sizes = (x.numel() // channels, channels, threshold, torch.get_num_threads())
        self._call.channel_sums(x.data_ptr(), _pointer(picked), sums.data_ptr(), parts.data_ptr(), *sizes)
        return sums

    def drop(self, x: Tensor, mask: Mask) -> Tensor:
        """x, times 256 / (256 - threshold), where a byte of `rng.random_bytes` is at least the threshold, else zero."""
        y = torch.empty_like(x)
        sizes = (x.numel(), mask.threshold, *rng.words(mask.key), mask.layer, torch.get_num_threads())
        self._call.drop(x.data_ptr(), y.data_ptr(), *sizes)
        return y

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over all but the last dimension, float32 (C,) each; there is at least one row."""
        channels = x.shape[-1]
        mean, variance, parts = _floats(channels), _floats(channels), _floats(self._call.sums_scratch(channels))
        sizes = (x.numel() // channels, channels, torch.get_num_threads())
        self._call.moments(x.data_ptr(), mean.data_ptr(), variance.data_ptr(), parts.data_ptr(), *sizes)
        return mean, variance

    def normalise(
        self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str, other: Tensor | None = None
    ) -> Tensor:
        """activation((x - mean) × scale + shift + other), the middle three float32 (C,), `other` like x."""
        y, channels = torch.empty_like(x), x.shape[-1]
        sizes = (x.numel() // channels, channels, ACTIVATIONS.index(activation), torch.get_num_threads())
        self._call.normalise(*map(_pointer, (x, other, y, mean, scale, shift)), *sizes)
        return y

    def normalise_gradient(
        self,
        x: Tensor,
        gradient: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        activation: str,
        other: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of `normalise`'s x, whose own moments mean and scale are, of its shift and of `other`."""
        channels = x.shape[-1]
        of_x, of_shift, parts = torch.empty_like(x), _floats(channels), _floats(self._call.sums_scratch(channels))
        of_other = None if other is None else torch.empty_like(other)
        tensors = (x, other, gradient, of_x, of_other, mean, scale, shift, of_shift, parts)
        sizes = (x.numel() // channels, channels, ACTIVATIONS.index(activation), torch.get_num_threads())
        self._call.normalise_gradient(*map(_pointer, tensors), *sizes)
        return of_x, of_shift, of_other

    def normalise_pixels(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(x - shift) × scale in float32, x uint8 (…, C), the others float32 (C,)."""
        y, channels = _floats(*x.shape), x.shape[-1]
        tensors = (x, y, shift, scale)
        sizes = (x.numel() // channels, channels, torch.get_num_threads())
        self._call.normalise_pixels(*(tensor.data_ptr() for tensor in tensors), *sizes)
        return y

    def gather(self, x: Tensor, indices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """uint8 (B, H', W', C): image i has, of image indices[i] (B,) of x uint8 (N, H, W, C), the pixels where rows[i]
        and columns[i] meet, int64 (B, H') and (B, W'). They are not checked."""
        y = torch.empty((len(indices), rows.shape[1], columns.shape[1], x.shape[3]), dtype=torch.uint8, device="cpu")
        sizes = (len(y), *x.shape[1:], *y.shape[1:3], torch.get_num_threads())
        self._call.gather(*map(_pointer, (x, y, indices, rows, columns)), *sizes)
        return y

    def byte_sums(self, x: Tensor) -> Tensor:
        """int64 (2, C): the sums over all but the last dimension of x, uint8 (N, H, W, C), and those of its squares."""
        images, height, width, channels = x.shape
        sums = torch.empty((2, channels), dtype=torch.int64, device="cpu")
        parts = torch.empty(self._call.sums_scratch(channels), dtype=torch.int64, device="cpu")
        sizes = (images * height, width, channels, torch.get_num_threads())
        self._call.byte_sums(*map(_pointer, (x, sums, parts)), *sizes)
        return sums

    def convolve_pixels(self, x: Tensor, filters: Tensor, activation: str) -> Tensor:
        """activation(x convolved without padding), x float32 (N, H, W, C), filters float32 (side, side, C, O)."""
        (images, height, width, channels), (side, _, _, outputs) = x.shape, filters.shape
        y = self._empty(images, height - side + 1, width - side + 1, outputs)
        own, threads = self._own(y.shape[2] * outputs), torch.get_num_threads()
        sizes = (images, height, width, channels, outputs, side, ACTIVATIONS.index(activation), threads)
        self._call.convolve_pixels(*map(_pointer, (x, filters, y)), *own, *sizes)
        return y

    def within(self, x: Tensor, limit: float) -> bool:
        """Whether no value of x, float32 or of the element type, is NaN or beyond ± limit; x is contiguous in some
        order of its dimensions."""
        tensors = (*_by_type(x), _numbers(limit))
        return not self._call.count_beyond(*map(_pointer, tensors), x.numel(), torch.get_num_threads())

    def moves(self, weights: Tensor, gradient: Tensor, *kept: Tensor | None) -> bool:
        """Whether `sgd_step` and `adam_step` take them. Not where elements are float32: then torch's optimizers have
        nothing to convert."""
        floats = [tensor for tensor in (weights, *kept) if tensor is not None]
        return (
            self.element == torch.bfloat16
            and all(tensor.dtype == torch.float32 for tensor in floats)
            and gradient.dtype in (torch.float32, torch.bfloat16)
            and all(tensor.is_contiguous() for tensor in (*floats, gradient))
        )

    def sgd_step(
        self,
        weights: Tensor,
        gradient: Tensor,
        momenta: Tensor | None,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
    ) -> None:
        """Move weights, and their momenta where there is momentum, all float32, by a step of SGD along a gradient,
        float32 or elements: as `torch.optim.SGD(fused=True)` does along one in float32, to the bit."""
        tensors = (weights, *_by_type(gradient), momenta, _numbers(lr, momentum, weight_decay))
        self._call.sgd_step(*map(_pointer, tensors), weights.numel(), nesterov, torch.get_num_threads())

    def adam_step(
        self,
        weights: Tensor,
        gradient: Tensor,
        means: Tensor,
        squares: Tensor,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled_weight_decay: bool,
    ) -> None:
        """Move weights, and the running means of their gradients and of the squares of those, all float32, by step
        `step` (from 1) of Adam along a gradient, float32 or elements: as `torch.optim.Adam(fused=True)`, or `AdamW`
        where decay is decoupled, does along one in float32, to the bit."""
        decays = (0, 1 - lr * weight_decay) if decoupled_weight_decay else (weight_decay, 1)
        corrected_rate, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        settings = _numbers(corrected_rate, 1 - beta1, 1 - beta2, beta2, root, eps, *decays)
        tensors = (weights, *_by_type(gradient), means, squares, settings)
        self._call.adam_step(*map(_pointer, tensors), weights.numel(), torch.get_num_threads())

    def orthogonalise(self, x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
        """float32 (M, N), M <= N: x, float32 too, over its norm, and then so many times multiplied by a + b s + c s²,
        where s is the newest x times its transpose and a, b, c are the coefficients."""
        y, scratch = torch.empty_like(x), _floats(self._call.orthogonalise_scratch(*x.shape))
        given = _numbers(*coefficients)
        self._call.orthogonalise(*map(_pointer, (x, y, scratch, given)), *x.shape, steps, torch.get_num_threads())
        return y

    def _own(self, floats: int) -> tuple[int, int]:
        """Pointer to scratch memory, and how many floats of it, at least so many, are each thread's own. It is kept
        from call to call, so that each finds its part in its core's cache: from another core's it arrives late."""
        floats = -(-floats // ALIGNED) * ALIGNED
        threads, kept = torch.get_num_threads(), getattr(self._scratch, "kept", None)
        if kept is None or len(kept) < threads or kept.shape[1] < floats:
            kept = self._scratch.kept = _floats(threads, max(floats, 0 if kept is None else kept.shape[1]))
        return kept.data_ptr(), kept.shape[1]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.element, device="cpu")

    def _winograd(self, height: int, width: int, padding: int) -> Callable[[str], Callable[..., int]]:
        """Functions of winograd.c by their names: those for a map of that size."""
        suffix = "_small" if height == width == 2 and padding == 1 else ""
        return lambda function: getattr(self._call, function + suffix)

    def _transformed(self, filters: Tensor, x: Tensor, padding: int) -> Tensor:
        outputs, _, _, channels = filters.shape
        call = self._winograd(x.shape[1], x.shape[2], padding)
        transformed = _floats(call("filters_size")(channels, outputs))
        threads = torch.get_num_threads()
        call("transform_filters")(filters.data_ptr(), transformed.data_ptr(), channels, outputs, threads)
        return transformed

    def _convolve(
        self,
        x: Tensor,
        x_picked: Tensor | None,
        transformed: Tensor,
        bias: Tensor | None,
        y: Tensor,
        y_picked: Tensor | None,
        padding: int,
        relu: bool = False,
        mask: Mask | None = None,
    ) -> None:
        """Write to `y`. Where x was pooled, its size before that is the one that makes y's."""
        images, height, width, channels = x.shape
        if x_picked is not None:
            height, width = y.shape[1] - 2 * padding + 2, y.shape[2] - 2 * padding + 2
        threads = torch.get_num_threads()
        call = self._winograd(height, width, padding)
        own = self._own(call("convolve_scratch")(images, height, width, channels, y.shape[3], padding, threads))
        draws, threshold = None, 0
        if mask is not None:
            draws, threshold = torch.empty(y.shape, dtype=torch.uint8, device="cpu"), mask.threshold
            self._call.random_bytes(draws.data_ptr(), draws.numel(), *rng.words(mask.key), mask.layer, threads)
        tensors = (x, x_picked, transformed, bias, y, y_picked, draws)
        sizes = (images, height, width, channels, y.shape[3], padding, relu, threshold, threads)
        call("convolve")(*map(_pointer, tensors), *own, *sizes)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _by_type(tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """As functions take what is in float32 or in elements: the one, the other."""
    return (tensor, None) if tensor.dtype == torch.float32 else (None, tensor)


@lru_cache(16)
def _numbers(*values: float) -> Tensor:
    """Numbers as functions in C read them, the same for all weights of a step. Read only."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
