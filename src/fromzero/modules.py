"""The modules that networks are made of.

Images are (N, C, H, W) in channels-last memory; a flattened image is in the order H, W, C, as in Keras. Where there are
compiled kernels, modules compute by them: the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fromzero import kernels
from fromzero.rng import derive, random_bytes, words

BATCH_NORM_MOMENTUM = 0.4  # how far batch normalisation's statistics go to those of a whole batch
TINY_MAP_PIXELS = 4  # input pixels up to which a convolution is computed as a dense layer
SMALL_MAP_PIXELS = 16  # output pixels up to which a convolution is computed as a matrix product, as measured
KERNEL_PIXELS, KERNEL_OUTPUTS = 5, 16  # output pixels and channels from which compiled kernels are used; and on 2×2
AHEAD_STEPS, AHEAD_BYTES = 64, 2**24  # the most that a GPU draws of a layer's masks at once, in 15 times the memory
WINOGRAD_INPUTS = 16  # channels from which Winograd's method is used; between it and DIRECT_CHANNELS PyTorch's is


@dataclass
class Masks:
    """What the dropout masks of a network are functions of: seed and step, which give a key of 64 bits, beside the
    number of the layer, of which there are so many; and whether dropout is on. used: whether a forward pass has drawn
    them; another one without a new step takes the next.

    words: the key as int32 (2,) on the network's device, for those who compute by PyTorch: where the network is
    compiled, a number would be part of the program, and every step another one."""

    seed: int = 0
    step: int = 0
    layers: int = 0
    on: bool = True
    used: bool = False
    words: Tensor = field(init=False)
    ahead: dict[int, _Ahead] = field(default_factory=dict)  # by layer

    def __post_init__(self) -> None:
        self.words = torch.tensor(words(self.key), dtype=torch.int32)

    @property
    def key(self) -> int:
        return self._keys(1)[0]

    def reseed(self, seed: int, step: int, on: bool = True) -> None:
        """Make the next masks those of (seed, step), or none."""
        self.seed, self.step, self.on, self.used = seed, step, on, False
        if on and self.layers:
            self.words = self._words(1)[0]

    def drawn(self, layer: int, count: int) -> Tensor:
        """Uint8 (count,) on the network's device: the layer's `random_bytes` of this step.

        On a GPU, where each of their 145 operations takes as long to be called as a million bytes to be computed, those
        of the steps to come are drawn with them, unless a compiler makes one operation of all."""
        steps = 1 if torch.compiler.is_compiling() else steps_ahead(self.words.device, count)
        if steps == 1:
            return random_bytes(self.words, layer, count)
        if layer in self.ahead and (drawn := self.ahead[layer].of(self.seed, self.step, count)) is not None:
            return drawn
        self.ahead[layer] = _Ahead(self.seed, self.step, random_bytes(self._words(steps), layer, count))
        return self.ahead[layer].drawn[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ahead": {}}  # which a copy can draw itself

    def _keys(self, steps: int) -> list[int]:
        return [derive(self.seed, "dropout", step) for step in range(self.step, self.step + steps)]

    def _words(self, steps: int) -> Tensor:
        """The keys of so many steps from this one on, int32 (steps, 2)."""
        keys = torch.tensor([words(key) for key in self._keys(steps)], dtype=torch.int32)
        return keys.to(self.words.device, non_blocking=True)


class _Ahead(NamedTuple):
    """A layer's random bytes of several steps from `step` on, uint8 (steps, count)."""

    seed: int
    step: int
    drawn: Tensor

    def of(self, seed: int, step: int, count: int) -> Tensor | None:
        """Those of (seed, step), uint8 (count,), if they are among these."""
        steps, most = self.drawn.shape
        if seed != self.seed or not 0 <= step - self.step < steps or count > most:
            return None
        return self.drawn[step - self.step, :count]


def steps_ahead(device: torch.device, count: int) -> int:
    """For how many steps at a time a layer's `count` random bytes are drawn."""
    return 1 if device.type == "cpu" else max(1, min(AHEAD_STEPS, AHEAD_BYTES // max(1, count)))


class Network(nn.Sequential):
    """Layers one after the other: float32 images (N, C, H, W), as `Normalise` makes them, → outputs (N, classes), whose
    softmax are probabilities. Dropout masks come from one key, another at every step: those of (seed, step) after
    `reseed`, else, in training mode and where PyTorch does not compile it, of the step after the one before."""

    def __init__(self, modules: Mapping[str, nn.Module], masks: Masks):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.masks = masks
        self.batch_norms = [module for module in self.modules() if isinstance(module, BatchNorm)]

    def weigh_batch(self, share: float) -> None:
        """Say how large the next batch is, as a share of a whole one. An epoch's last batch may be a few images, and
        what is evaluated after it would be normalised by them: statistics follow a batch by its share."""
        for norm in self.batch_norms:
            norm.momentum = BATCH_NORM_MOMENTUM if share == 1 else 1 - (1 - BATCH_NORM_MOMENTUM) ** share

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.compiler.is_compiling():  # which goes on with steps of its own, each reseeded
            if self.masks.used and torch._C._current_graph_task_id() == -1:  # else a gradient has it computed again
                self.masks.reseed(self.masks.seed, self.masks.step + 1, self.masks.on)
            self.masks.used = True
        return cast(Tensor, super().forward(x))

    def reseed(self, seed: int, step: int, dropout: bool = True) -> None:
        """Make the dropout masks of the next forward pass those of (seed, step), or turn dropout off."""
        self.masks.reseed(seed, step, dropout)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, "relu": F.relu, "gelu": F.gelu}


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with a trained shift and no scale, which the next filters have already; its statistics
    follow fast (BATCH_NORM_MOMENTUM of each batch), as suits short trainings (Jordan, 2024, arXiv:2404.00498). Behind
    it comes its `activation`, one of ACTIVATIONS, and before that what `other` images it is given are added."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(self, channels: int, activation: str = ""):
        super().__init__(channels, eps=1e-5, momentum=BATCH_NORM_MOMENTUM)
        # A scale of ones and not None, with which PyTorch's CUDA kernel gives the shift an empty gradient.
        del self.weight
        self.register_buffer("weight", torch.ones(channels), persistent=False)
        self.register_buffer("num_batches_tracked", None)  # counted for the sake of momentum=None only
        self.activation = activation

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        # One value a channel has no variance: an epoch's last batch of one image, on a map of one pixel.
        count = x.shape[0] * x.shape[2] * x.shape[3]
        training = self.training and count != 1
        fitting = x.shape[1] == self.num_features and self.bias.dtype == self.running_mean.dtype == torch.float32
        fitting = fitting and count > 0 and (other is None or other.shape == x.shape)
        kernel = kernels.in_use(x) if fitting else None
        if kernel is None or (torch.is_grad_enabled() and not training):
            statistics = self.running_mean, self.running_var
            y = F.batch_norm(x, *statistics, self.weight, self.bias, training, self.momentum, self.eps)
            return ACTIVATIONS[self.activation](y if other is None else y + other)
        x = x.to(kernel.element).contiguous(memory_format=torch.channels_last)
        if other is not None:
            other = other.to(kernel.element).contiguous(memory_format=torch.channels_last)
        mean, variance = self.running_mean, self.running_var
        if training:
            with torch.no_grad():
                mean, variance = kernel.moments(x.permute(0, 2, 3, 1))
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt()
        return kernels.BatchNorm.apply(x, mean, scale, self.bias, other, self.activation, kernel)

    def extra_repr(self) -> str:
        return f"{self.num_features}, activation={self.activation!r}"


class Residual(nn.Sequential):
    """What its layers make of their input, added to that input (He et al., 2016): by the last of them where that
    normalises, so that its activation can come behind the sum."""

    def forward(self, x: Tensor) -> Tensor:
        *before, last = self
        y = x
        for layer in before:
            y = layer(y)
        return last(y, x) if isinstance(last, BatchNorm) else last(y) + x


class Whitening(nn.Conv2d):
    """The whitening layer, with its `activation`, one of ACTIVATIONS. With `same` padding an even window sees one more
    row and column below and to the right, as in Keras."""

    def __init__(self, inputs: int, outputs: int, side: int, same: bool, activation: str = ""):
        super().__init__(inputs, outputs, side, bias=False)
        before, after = ((side - 1) // 2, side // 2) if same else (0, 0)
        self.border = (before, after, before, after)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.border) if any(self.border) else x
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        fitting = len(x) > 0 and x.shape[1] == self.in_channels and min(x.shape[2:]) >= self.weight.shape[2]
        kernel = kernels.in_use(x) if fitting and not trained else None
        if kernel is None:
            # Not in bfloat16: directions of little variance have large filters, which it would round.
            with torch.autocast(x.device.type, enabled=False):
                return ACTIVATIONS[self.activation](super().forward(x.to(self.weight.dtype)))
        images, filters = (
            x.float().permute(0, 2, 3, 1).contiguous(),
            self.weight.float().permute(2, 3, 1, 0).contiguous(),
        )
        return kernel.convolve_pixels(images, filters, self.activation).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


@torch.no_grad()
def whiten(model: Network, images: Tensor) -> None:
    """Set the whitening layer, if there is one, from normalised `images` (N, C, H, W): its filters are the
    eigenvectors of their patches' covariance, as many as it has room for, each divided by its standard deviation, once
    with each sign (Page, 2019; Jordan, 2024). Directions in which patches do not differ at all, as those between the
    channels of grey images, are left out and the others taken again: batch normalisation would divide a channel that
    is constant by the root of its epsilon, and its gradient, 300 times too large, would be all that is learned."""
    layer = getattr(model, "whitening", None)
    if layer is None:
        return
    side, channels = layer.kernel_size[0], layer.in_channels
    height, width = (size - side + 1 for size in images.shape[2:])
    covariance, count = torch.zeros(layer.weight[0].numel(), layer.weight[0].numel(), dtype=torch.float64), 0
    for part in images.split(50):  # whose patches stay in the cache
        pixels = part.cpu().permute(0, 2, 3, 1).double()
        seen = [pixels[:, y : y + height, x : x + width] for y in range(side) for x in range(side)]
        patches = torch.cat(seen, dim=3).flatten(0, 2)  # their pixels side by side, as memory has them
        covariance += patches.T @ patches
        count += len(patches)
    # The filters have a channel's pixels side by side.
    order = torch.arange(len(covariance)).view(side, side, channels).permute(2, 0, 1).flatten()
    covariance = covariance[order][:, order]
    values, vectors = torch.linalg.eigh(covariance / count)
    filters = (vectors / (values + 5e-4).sqrt()).T.flip(0)[: max(1, int((values > 1e-6 * values[-1]).sum()))]
    filters = filters[torch.arange(len(layer.weight) // 2) % len(filters)]
    # An eigenvector is one only up to its sign: make the largest entry positive.
    largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    filters = (filters * largest.sign()).view(-1, *layer.weight.shape[1:])
    layer.weight.copy_(torch.cat([filters, -filters]))


class Convolution(nn.Conv2d):
    """A 3×3 convolution with what is behind it: a `pooling` with its `dropout`, or a ReLU. It is computed by compiled
    kernels where there are some, and on a processor as one matrix product where the map is small.

    oneDNN's convolutions reach a small part of the processor's speed on maps of a few pixels, above all in the
    gradient of the weights (docs/log.md); a matrix product over the 9 × C columns of each output pixel does not.
    """

    pooling: MaxPool | None
    dropout: Dropout | None  # of what has been pooled
    relu: bool  # where there is no pooling: a pooling has a ReLU of its own

    def __init__(self, inputs: int, outputs: int, padding: int, bias: bool):
        super().__init__(inputs, outputs, 3, padding=padding, bias=bias)
        self.pooling, self.dropout, self.relu = None, None, False

    def forward(self, x: Tensor) -> Tensor:
        padding = int(self.padding[0])
        height, width = (size + 2 * padding - 2 for size in x.shape[2:])
        outputs, inputs = self.weight.shape[:2]
        large = height * width >= KERNEL_PIXELS or height == width == x.shape[2] == x.shape[3] == 2
        fitting = len(x) > 0 and x.shape[1] == inputs and outputs >= KERNEL_OUTPUTS
        kernel = kernels.in_use(x) if large and fitting else None
        pooled = self.pooling is not None and self.pooling.kernel_size == 2 and min(height, width) >= 2
        relu = self.pooling.relu if self.pooling else self.relu
        if kernel and inputs <= kernels.DIRECT_CHANNELS and (pooled or not self.pooling):
            y = kernels.ConvolveDirectly.apply(x, self.weight, self.bias, padding, pooled, relu, kernel)
            relu = False
        elif kernel and inputs >= WINOGRAD_INPUTS:
            mask = self.dropout.mask() if self.dropout and pooled else None
            y = kernels.Convolve3x3.apply(x, self.weight, self.bias, padding, pooled, relu, mask, kernel)
            if pooled:
                return y
        else:
            y, pooled = self._convolved(x, padding, height, width), False
        if self.pooling:
            y = y if pooled else self.pooling(y)
            return self.dropout(y) if self.dropout else y
        return F.relu(y) if relu else y

    def extra_repr(self) -> str:
        behind = f"pooling={self.pooling}, dropout={self.dropout}, relu={self.relu}"
        return f"{super().extra_repr()}, {behind}"

    def _convolved(self, x: Tensor, padding: int, height: int, width: int) -> Tensor:
        """By PyTorch: its own convolution to a map of height × width, or a matrix product."""
        if x.device.type != "cpu" or height * width > SMALL_MAP_PIXELS or min(height, width, len(x)) < 1:
            return super().forward(x)
        if x.shape[2] * x.shape[3] <= TINY_MAP_PIXELS:
            matrix = _Unrolled.apply(self.weight, *x.shape[2:], padding)
            pixels = x.permute(0, 2, 3, 1).flatten(1)
            y = F.linear(pixels, matrix, None if self.bias is None else self.bias.repeat(height * width))
            return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)
        columns = _Columns.apply(x, padding)
        y = F.linear(columns, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)


class _Unrolled(torch.autograd.Function):
    """Filters (O, C, 3, 3) as the matrix (H'·W'·O, H·W·C) of a dense layer from all pixels of a map (H, W) to all of
    its convolution. On a map of 2×2 that takes 16 products a channel pair; over columns it takes 36, most of them with
    the padding's zeros."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, height: int, width: int, padding: int) -> Tensor:
        outputs, inputs = weight.shape[:2]
        shape = (height + 2 * padding - 2, width + 2 * padding - 2, outputs, height, width, inputs)
        ctx.padding, ctx.shape = padding, shape
        computed_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        matrix = torch.zeros(shape, dtype=computed_in)
        for (y, x, row, column), (down, right) in _taps(shape, padding):
            matrix[y, x, :, row, column] = weight[:, :, down, right]
        return matrix.flatten(3).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        matrix = gradients[0].view(ctx.shape)
        precise = torch.promote_types(matrix.dtype, torch.float32)
        weight = torch.zeros(3, 3, ctx.shape[2], ctx.shape[5], dtype=precise)
        for (y, x, row, column), (down, right) in _taps(ctx.shape, ctx.padding):
            weight[down, right] += matrix[y, x, :, row, column]
        return weight.permute(2, 3, 0, 1), None, None, None


def _taps(shape: Sequence[int], padding: int) -> Iterator[tuple[tuple[int, ...], tuple[int, int]]]:
    """((row, column of the output, of the input), which of the 3×3 weights joins them) of a convolution whose matrix
    has `shape` (H', W', O, H, W, C)."""
    for places in product(*(range(shape[axis]) for axis in (0, 1, 3, 4))):
        down, right = places[2] - places[0] + padding, places[3] - places[1] + padding
        if 0 <= down < 3 and 0 <= right < 3:
            yield places, (down, right)


class _Columns(torch.autograd.Function):
    """(N, C, H, W) → (N·H'·W', 9·C): for each pixel of a 3×3 convolution's output what its window sees, in the order
    row, column, channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int) -> Tensor:
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
        images, height, width, channels = padded.shape
        ctx.padding, ctx.shape = padding, padded.shape
        n, h, w, c = padded.stride()
        windows = padded.as_strided((images, height - 2, width - 2, 3, 3, channels), (n, h, w, h, w, c))
        return windows.reshape(-1, 9 * channels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        images, height, width, channels = ctx.shape
        windows = gradients[0].view(images, height - 2, width - 2, 3, 3, channels)
        # Nine terms meet in a pixel: they are added in float32 at least, as oneDNN does, and rounded once.
        precise = torch.promote_types(windows.dtype, torch.float32)
        padded = torch.zeros(ctx.shape, dtype=precise, device=windows.device)
        for row in range(3):
            for column in range(3):
                padded[:, row : row + height - 2, column : column + width - 2] += windows[:, :, :, row, column]
        p = ctx.padding
        inner = padded[:, p : height - p, p : width - p].to(windows.dtype)
        return inner.permute(0, 3, 1, 2), None


class Linear(nn.Linear):
    """A dense layer whose weights get their gradient in the type that it is computed in, under autocast bfloat16: half
    of the memory, for an optimizer that reads it so; for others autograd converts it."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not (torch.is_autocast_enabled(kind) and torch.is_grad_enabled()):
            return super().forward(x)
        return _Dense.apply(x, self.weight, self.bias, torch.get_autocast_dtype(kind))


class _Dense(torch.autograd.Function):
    """`F.linear(x, weight, bias)` in another type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, computed_in: torch.dtype) -> Tensor:
        x, weight = x.to(computed_in), weight.to(computed_in)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias.to(computed_in))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        # Turned before it is multiplied: the library takes up to half as long then (docs/log.md).
        return of_x, gradient.T.contiguous() @ x, gradient.sum(0), None


class MaxPool(nn.MaxPool2d):
    """Max pooling, followed by a ReLU where it has been given one."""

    def __init__(self, window: int, relu: bool):
        super().__init__(window)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == 2 and min(x.shape[2:]) >= 2 and (kernel := kernels.in_use(x)):
            return kernels.MaxPool2x2.apply(x, self.relu, kernel)
        y = super().forward(x)
        return F.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, relu={self.relu}"


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al., 2014) whose mask is read from random bytes, 1 an element, drawn by `masks`.

    The rate is rounded to the nearest 1/256 (0.25 and 0.5 are exact), and what is kept is scaled by that rounded
    rate, so the expectation is exact. The mask is a function of the key, the number of the layer and the place of an
    element in the order (N, H, W, C): not of the memory format, the precision or the device.
    """

    def __init__(self, rate: float, masks: Masks):
        super().__init__()
        self.rate = rate
        self.masks = masks
        self.layer = masks.layers
        masks.layers += 1
        self.threshold = min(round(rate * 256), 255)

    @property
    def drops(self) -> bool:
        """Whether it drops anything in this step."""
        return self.training and self.masks.on and self.threshold > 0

    def mask(self) -> kernels.Mask | None:
        """What it keeps in this step, for compiled kernels; None when all."""
        return kernels.Mask(self.threshold, self.masks.key, self.layer) if self.drops else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        if x.dim() == 4:
            return self._drop(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._drop(x)

    def _drop(self, x: Tensor) -> Tensor:
        if (kernel := kernels.in_use(x)) and x.dtype == kernel.element:
            return kernels.Drop.apply(x, self.mask(), kernel)
        kept = self.masks.drawn(self.layer, x.numel()).view(x.shape) >= self.threshold
        return x * kept.to(x.dtype).mul_(256 / (256 - self.threshold))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Flatten(nn.Module):
    """(N, C, H, W) → (N, H·W·C): Keras's order, and a view of channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class GlobalPool(nn.Module):
    """(N, C, H, W) → (N, C)"""

    def __init__(self, reduce: Callable[..., Tensor]):
        super().__init__()
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(x, (2, 3))


class Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
