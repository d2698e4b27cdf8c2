"""Kernels that are compiled for this processor: 3×3 convolutions by Winograd's method, twice as fast as oneDNN's,
with the pooling behind them; pooling with the ReLU behind it; batch normalisation with the activation behind it.

Their C source lies beside this file. It is compiled by the machine's own C compiler the first time it is needed,
checked against PyTorch, and kept under `FROMZERO_HOME`. Where there is no compiler, or what it made computes anything
else, PyTorch's own are used: the same functions, other bits. So what is used has a name, and `Machine` records it.
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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fromzero import files
from fromzero.errors import FromzeroError

NONE = "none"
POINTWISE = "-pointwise"  # ends the name of kernels that leave convolutions to PyTorch
SOURCE_FOLDER = Path(__file__).parent
SOURCES = ("winograd.c", "pointwise.c")
HEADER = "vectors.h"
# Compiled and linked apart, so that OpenMP is the one that torch has loaded, with its threads, and not a second.
COMPILE = ("-O3", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared",)
NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native"}  # elsewhere -mcpu=native
COMPILE_SECONDS = 60.0
ACTIVATIONS = ("", "relu", "gelu")  # in the order of pointwise.c
Pooled = Literal["", "pool", "relu"]  # what is behind a convolution: nothing, max pooling, max pooling and a ReLU
# Of the check, over the largest value. Errors are a tenth of it.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

_loaded: dict[torch.dtype, Kernels] = {}


def find(element: torch.dtype, convolutions: bool = True) -> str:
    """The name of the kernels for `element` on this machine, made if need be; NONE where there are none."""
    if os.name != "posix" or os.environ.get("FROMZERO_KERNELS") == "off":
        return NONE
    name, _ = _made(element)
    return name if convolutions or name == NONE else name + POINTWISE


def use(name: str, element: torch.dtype) -> None:
    """From now on compute in `element` by the kernels of that name, and in other types by PyTorch's; NONE: all by
    PyTorch's. Raises FromzeroError where those kernels are not."""
    _loaded.clear()
    if name == NONE:
        return
    found, kernels = _made(element)
    if kernels is None or name.removesuffix(POINTWISE) != found:
        raise FromzeroError(f"the kernels {name} are not on this machine; it has: {found}")
    kernels.convolves = name == found
    _loaded[element] = kernels


def in_use(x: Tensor) -> Kernels | None:
    """The kernels that compute on `x`, if any: those of the type that autocast would give it."""
    if x.device.type != "cpu" or x.dtype == torch.float64:  # which autocast leaves as it is
        return None
    return _loaded.get(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)


class Kernels:
    """Functions on images (N, H, W, C) of `element`: 3×3 convolutions of stride 1 with zero padding, filters
    (O, 3, 3, C) in float32; 2×2 max pooling; batch normalisation; dropout. All tensors are contiguous. `convolves`:
    whether convolutions are to be computed by them."""

    def __init__(self, library: Path, element: torch.dtype):
        """Raises OSError if the library cannot be loaded."""
        self.element = element
        self.convolves = True
        self._call = ctypes.CDLL(str(library))
        for function, pointers, numbers, result in (
            ("transform_filters", 2, 3, None),
            ("transform_turned_filters", 2, 3, None),
            ("convolve", 7, 8, None),
            ("filter_gradient", 5, 7, None),
            ("max_pool", 2, 6, None),
            ("max_pool_gradient", 4, 6, None),
            ("channel_sums", 4, 3, None),
            ("drop", 3, 3, None),
            ("unroll", 2, 6, None),
            ("unroll_gradient", 2, 6, None),
            ("moments", 4, 3, None),
            ("normalise", 5, 4, None),
            ("normalise_gradient", 8, 4, None),
            ("filters_size", 0, 2, ctypes.c_long),
            ("convolve_scratch", 0, 6, ctypes.c_long),
            ("sums_scratch", 0, 1, ctypes.c_long),
            ("filter_gradient_scratch", 0, 7, ctypes.c_long),
        ):
            entry = getattr(self._call, function)
            entry.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_long] * numbers
            entry.restype = result

    def forward(self, x: Tensor, filters: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """x (N, H, W, C) → (N, H', W', O), H' = H + 2 padding - 2; bias float32 (O,) or None."""
        images, height, width, _ = x.shape
        y = self._empty(images, height + 2 * padding - 2, width + 2 * padding - 2, len(filters))
        self._convolve(x, None, self._transformed(filters), bias, y, None, padding, False)
        return y

    def forward_pooled(
        self, x: Tensor, filters: Tensor, bias: Tensor | None, padding: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        """`max_pool` of `forward`, (N, H'/2, W'/2, O), and uint8 of the same shape: which pixel of its window it is, 0
        to 3, or 4 where `relu` has made a zero of it."""
        images, height, width, _ = x.shape
        y = self._empty(images, (height + 2 * padding - 2) // 2, (width + 2 * padding - 2) // 2, len(filters))
        picked = torch.empty(y.shape, dtype=torch.uint8, device="cpu")
        self._convolve(x, None, self._transformed(filters), bias, y, picked, padding, relu)
        return y, picked

    def input_gradient(
        self, gradient: Tensor, filters: Tensor, padding: int, of: torch.Size, picked: Tensor | None = None
    ) -> Tensor:
        """The gradient of x, of the shape `of`, from that of the result of `forward`, or, with `picked`, of
        `forward_pooled`."""
        outputs, _, _, channels = filters.shape
        transformed = _floats(self._call.filters_size(outputs, channels))
        threads = torch.get_num_threads()
        self._call.transform_turned_filters(filters.data_ptr(), transformed.data_ptr(), channels, outputs, threads)
        of_x = self._empty(*of)
        self._convolve(gradient, picked, transformed, None, of_x, None, 2 - padding, False)
        return of_x

    def filter_gradient(self, x: Tensor, gradient: Tensor, padding: int, picked: Tensor | None = None) -> Tensor:
        """The gradient of the filters, float32 (O, C, 3, 3) in channels-last memory, from that of the result, as
        `input_gradient`."""
        sizes = (*x.shape, gradient.shape[3], padding, torch.get_num_threads())
        scratch = _floats(self._call.filter_gradient_scratch(*sizes))
        shape = (gradient.shape[3], x.shape[3], 3, 3)
        filters = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
        pointers = (x.data_ptr(), gradient.data_ptr(), _pointer(picked), filters.data_ptr(), scratch.data_ptr())
        self._call.filter_gradient(*pointers, *sizes)
        return filters

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

    def channel_sums(self, x: Tensor, picked: Tensor | None = None) -> Tensor:
        """Sums over all but the last dimension, float32 (C,), of what `picked` does not say 4 of."""
        channels = x.shape[-1]
        sums, parts = _floats(channels), _floats(self._call.sums_scratch(channels))
        sizes = (x.numel() // channels, channels, torch.get_num_threads())
        self._call.channel_sums(x.data_ptr(), _pointer(picked), sums.data_ptr(), parts.data_ptr(), *sizes)
        return sums

    def drop(self, x: Tensor, draws: Tensor, threshold: int) -> Tensor:
        """x, times 256 / (256 - threshold), where a byte of `draws` is at least `threshold`, else zero."""
        y = torch.empty_like(x)
        sizes = (x.numel(), threshold, torch.get_num_threads())
        self._call.drop(x.data_ptr(), draws.data_ptr(), y.data_ptr(), *sizes)
        return y

    def unroll(self, filters: Tensor, height: int, width: int, padding: int) -> Tensor:
        """Filters as the matrix (H'·W'·O, H·W·C) of a dense layer from a map of height × width to its convolution."""
        outputs, _, _, channels = filters.shape
        pixels = (height + 2 * padding - 2) * (width + 2 * padding - 2)
        matrix = self._empty(pixels * outputs, height * width * channels)
        sizes = (height, width, channels, outputs, padding, torch.get_num_threads())
        self._call.unroll(filters.data_ptr(), matrix.data_ptr(), *sizes)
        return matrix

    def unroll_gradient(self, matrix: Tensor, of: torch.Size, height: int, width: int, padding: int) -> Tensor:
        """The gradient of filters of shape `of` (O, C, 3, 3), float32 in channels-last memory, from that of `unroll`'s
        result."""
        filters = torch.empty(of, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
        sizes = (height, width, of[1], of[0], padding, torch.get_num_threads())
        self._call.unroll_gradient(matrix.data_ptr(), filters.data_ptr(), *sizes)
        return filters

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over all but the last dimension, float32 (C,) each; there is at least one row."""
        channels = x.shape[-1]
        mean, variance, parts = _floats(channels), _floats(channels), _floats(self._call.sums_scratch(channels))
        sizes = (x.numel() // channels, channels, torch.get_num_threads())
        self._call.moments(x.data_ptr(), mean.data_ptr(), variance.data_ptr(), parts.data_ptr(), *sizes)
        return mean, variance

    def normalise(self, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
        """activation((x - mean) × scale + shift), the last three float32 (C,)."""
        y, channels = torch.empty_like(x), x.shape[-1]
        pointers = (x.data_ptr(), y.data_ptr(), mean.data_ptr(), scale.data_ptr(), shift.data_ptr())
        sizes = (x.numel() // channels, channels, ACTIVATIONS.index(activation), torch.get_num_threads())
        self._call.normalise(*pointers, *sizes)
        return y

    def normalise_gradient(
        self, x: Tensor, gradient: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `normalise`'s x, whose own moments mean and scale are, and of its shift."""
        channels = x.shape[-1]
        of_x, of_shift, parts = torch.empty_like(x), _floats(channels), _floats(self._call.sums_scratch(channels))
        tensors = (x, gradient, of_x, mean, scale, shift, of_shift, parts)
        sizes = (x.numel() // channels, channels, ACTIVATIONS.index(activation), torch.get_num_threads())
        self._call.normalise_gradient(*(tensor.data_ptr() for tensor in tensors), *sizes)
        return of_x, of_shift

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.element, device="cpu")

    def _transformed(self, filters: Tensor) -> Tensor:
        outputs, _, _, channels = filters.shape
        transformed = _floats(self._call.filters_size(channels, outputs))
        threads = torch.get_num_threads()
        self._call.transform_filters(filters.data_ptr(), transformed.data_ptr(), channels, outputs, threads)
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
        relu: bool,
    ) -> None:
        """Write to `y`. Where x was pooled, its size before that is the one that makes y's."""
        images, height, width, channels = x.shape
        if x_picked is not None:
            height, width = y.shape[1] - 2 * padding + 2, y.shape[2] - 2 * padding + 2
        threads = torch.get_num_threads()
        scratch = _floats(self._call.convolve_scratch(images, height, width, channels, padding, threads))
        tensors = (x, x_picked, transformed, bias, y, y_picked, scratch)
        sizes = (images, height, width, channels, y.shape[3], padding, relu, threads)
        self._call.convolve(*map(_pointer, tensors), *sizes)


class Convolve3x3(torch.autograd.Function):
    """`F.conv2d(x, weight, bias, padding=padding)` for 3×3 filters, by `kernels`; x and result are (N, C, H, W) in
    channels-last memory and of the kernels' element type, weight and bias float32. With `pooled` followed by
    `F.max_pool2d(…, 2)`, with "relu" at least zero: the map before it is never written, and no gradient of its size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, pooled: Pooled, kernels: Kernels
    ) -> Tensor:
        images = x.to(kernels.element).permute(0, 2, 3, 1).contiguous()
        filters = weight.float().permute(0, 2, 3, 1).contiguous()
        bias = None if bias is None else bias.float().contiguous()
        picked = None
        if pooled:
            y, picked = kernels.forward_pooled(images, filters, bias, padding, pooled == "relu")
        else:
            y = kernels.forward(images, filters, bias, padding)
        ctx.save_for_backward(images, filters, picked)
        ctx.padding, ctx.kernels, ctx.dtype = padding, kernels, x.dtype
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, filters, picked = ctx.saved_tensors
        kernels, padding = ctx.kernels, ctx.padding
        gradient = gradients[0].to(kernels.element).permute(0, 2, 3, 1).contiguous()
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_x = kernels.input_gradient(gradient, filters, padding, images.shape, picked)
            of_x = of_x.permute(0, 3, 1, 2).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = kernels.filter_gradient(images, gradient, padding, picked)
        if ctx.needs_input_grad[2]:
            of_bias = kernels.channel_sums(gradient, picked)
        return of_x, of_weight, of_bias, None, None, None


class MaxPool2x2(torch.autograd.Function):
    """`F.max_pool2d(x, 2)`, with `relu` at least zero, by `kernels`; x (N, C, H, W) in channels-last memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relu: bool, kernels: Kernels) -> Tensor:
        images = x.to(kernels.element).permute(0, 2, 3, 1).contiguous()
        y = kernels.max_pool(images, relu)
        ctx.save_for_backward(images, y)
        ctx.relu, ctx.kernels, ctx.dtype = relu, kernels, x.dtype
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, y = ctx.saved_tensors
        gradient = gradients[0].to(ctx.kernels.element).permute(0, 2, 3, 1).contiguous()
        of_x = ctx.kernels.max_pool_gradient(images, y, gradient, ctx.relu)
        return of_x.permute(0, 3, 1, 2).to(ctx.dtype), None, None


class BatchNorm(torch.autograd.Function):
    """`activation((x - mean) × scale + shift)` by `kernels`, mean and scale being x's own: batch normalisation in
    training. x (N, C, H, W) in channels-last memory, the last three float32 (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str, kernels: Kernels
    ) -> Tensor:
        images = x.permute(0, 2, 3, 1)
        ctx.save_for_backward(images, mean, scale, shift)
        ctx.activation, ctx.kernels = activation, kernels
        return kernels.normalise(images, mean, scale, shift, activation).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, mean, scale, shift = ctx.saved_tensors
        gradient = gradients[0].to(ctx.kernels.element).permute(0, 2, 3, 1).contiguous()
        of_x, of_shift = ctx.kernels.normalise_gradient(images, gradient, mean, scale, shift, ctx.activation)
        return of_x.permute(0, 3, 1, 2), None, None, of_shift, None, None


class Drop(torch.autograd.Function):
    """Dropout by `kernels`: of what the bytes `draws` (uint8, of x's size) let pass, scaled so that its mean stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draws: Tensor, threshold: int, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(draws)
        ctx.threshold, ctx.kernels = threshold, kernels
        return kernels.drop(x.contiguous(), draws, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (draws,) = ctx.saved_tensors
        gradient = gradients[0].to(ctx.kernels.element).contiguous()
        return ctx.kernels.drop(gradient, draws, ctx.threshold), None, None, None


class Unroll(torch.autograd.Function):
    """Filters (O, C, 3, 3), float32, as `Kernels.unroll` makes a matrix of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, height: int, width: int, padding: int, kernels: Kernels) -> Tensor:
        ctx.shape, ctx.map, ctx.kernels = weight.shape, (height, width, padding), kernels
        return kernels.unroll(weight.float().permute(0, 2, 3, 1).contiguous(), height, width, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].to(ctx.kernels.element).contiguous()
        return ctx.kernels.unroll_gradient(gradient, ctx.shape, *ctx.map), None, None, None, None


@cache
def _made(element: torch.dtype) -> tuple[str, Kernels | None]:
    """Name and kernels for `element`, compiled unless they are there already; (NONE, None) where that fails."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return NONE, None
    flags = [*COMPILE, NATIVE.get(platform.machine(), "-mcpu=native")]
    if element == torch.bfloat16:
        flags.append("-DBFLOAT16")
    try:
        _, _, version = _run([compiler, "--version"]).partition("\n")[0].partition(" ")  # the name is how it was called
        sources = [(SOURCE_FOLDER / name).read_text("utf-8") for name in (*SOURCES, HEADER)]
        identity = "\0".join([*sources, *flags, *LINK, version, _processor()])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        kept = files.home() / "kernels"
        kernels = _kept(kept, digest, element)
        with tempfile.TemporaryDirectory() as nowhere:
            if kernels is None:
                kernels = _compiled(compiler, flags, _writable(kept) or Path(nowhere), digest, element)
        return (NONE, None) if kernels is None else (digest, kernels)
    except (OSError, subprocess.SubprocessError, AttributeError):
        return NONE, None


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
        fresh = Path(place) / "kernels.so"
        objects = [str(Path(place) / f"{name}.o") for name in SOURCES]
        for name, made in zip(SOURCES, objects, strict=True):
            _run([compiler, *flags, str(SOURCE_FOLDER / name), "-o", made])
        _run([compiler, *LINK, *objects, "-o", str(fresh)])
        kernels = Kernels(fresh, element)
        if not agrees(kernels):
            return None
        os.replace(fresh, folder / f"{digest}-{_content_digest(fresh)}.so")
        return kernels


def _content_digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


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
        pooled = kernels.max_pool(x, relu=True)
        mean, variance = kernels.moments(x)
        normal = mean, (variance + 1e-5).rsqrt(), shift.detach(), "gelu"
        convolved, picked = kernels.forward_pooled(x, filters, bias, 1, relu=True)
        of_convolved = drawn(*convolved.shape).to(element)
        of_unrolled = drawn(6 * 19, 6 * 33).to(element)
        pixels = torch.eye(6 * 33, dtype=torch.float32, device="cpu").view(-1, 2, 3, 33)
        draws_of_x = torch.randint(0, 256, x.shape, generator=draws, dtype=torch.uint8, device="cpu")
        # A gradient as the pooling hands it back: the pooled map's, where it was picked.
        places = (picked[..., None] == torch.arange(4, device="cpu")) * of_convolved[..., None]
        spread = torch.zeros_like(gradient)
        spread[:, :6] = places.unflatten(-1, (2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
        ours = (
            kernels.forward(x, filters, bias, 1),
            kernels.input_gradient(gradient, filters, 1, x.shape),
            kernels.filter_gradient(x, gradient, 1).permute(0, 2, 3, 1),
            pooled,
            kernels.max_pool_gradient(x, pooled, of_pool, relu=True),
            kernels.channel_sums(x).expand(1, 1, 1, -1),
            convolved,
            kernels.input_gradient(of_convolved, filters, 1, x.shape, picked),
            kernels.filter_gradient(x, of_convolved, 1, picked).permute(0, 2, 3, 1),
            kernels.channel_sums(of_convolved, picked).expand(1, 1, 1, -1),
            kernels.normalise(x, *normal),
            kernels.normalise_gradient(x, x, *normal)[0],
            kernels.drop(x, draws_of_x, 64),
            kernels.unroll(filters, 2, 3, 1).view(6, 19, 6, 33),
            kernels.unroll_gradient(of_unrolled, leaf_filters.shape, 2, 3, 1).permute(0, 2, 3, 1),
        )
        y = F.conv2d(leaf, leaf_filters, bias, padding=1)
        theirs = [y, *of(y, gradient, leaf, leaf_filters)]
        z = F.relu(F.max_pool2d(leaf, 2))
        theirs += [z, *of(z, of_pool, leaf), leaf.sum((0, 2, 3), keepdim=True)]
        theirs += [F.relu(F.max_pool2d(y, 2)), *of(y, spread, leaf, leaf_filters)]
        theirs.append(spread.float().sum((0, 1, 2)).view(1, -1, 1, 1))
        z = F.gelu(F.batch_norm(leaf, None, None, None, shift, training=True, eps=1e-5))
        theirs += [z, *of(z, x, leaf), leaf * (draws_of_x.permute(0, 3, 1, 2) >= 64) / 0.75]
        y = F.conv2d(pixels.permute(0, 3, 1, 2), leaf_filters, padding=1)  # of one pixel's one channel at a time
        y = y.permute(2, 3, 1, 0).reshape(6, 19, 6, 33)
        theirs += [y.permute(0, 3, 1, 2), *of(y.permute(0, 3, 1, 2), of_unrolled.view(6, 19, 6, 33), leaf_filters)]
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
