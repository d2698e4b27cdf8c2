"""Whether compiled kernels compute what PyTorch does: small maps through each of them, in pairs of its result and what
PyTorch makes of the same in float32.

It takes place at every start, on whatever device and type of element is PyTorch's default there, so both are named
throughout. A gradient is that of a sum: one that is handed to autograd imports sympy, a second at the start of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero.kernels.interface import Kernels, Mask
from fromzero.rng import random_bytes, words

# Largest error over the largest value. Errors are a tenth of it.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
MASK = Mask(64, 2**63 - 5, 3)

Pairs = Iterator[tuple[Tensor, Tensor]]  # (a kernel's result, PyTorch's)


def agrees(kernels: Kernels) -> bool:
    """Whether every kernel, on a small map, computes what PyTorch does."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        draws, tolerance = _Draws(kernels.element), TOLERANCE[kernels.element]
        return all(_equal(*pair, tolerance) for check in CHECKS for pair in check(kernels, draws))


def _equal(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    error = (ours.float() - theirs.detach()).abs().max()
    return ours.shape == theirs.shape and bool(error <= tolerance * theirs.abs().max())


class _Draws:
    """Random values from -0.5 to 0.5, the same every time."""

    def __init__(self, element: torch.dtype):
        self.element, self.generator = element, torch.Generator().manual_seed(0)

    def floats(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu") - 0.5

    def elements(self, *shape: int) -> Tensor:
        return self.floats(*shape).to(self.element)

    def bytes(self, *shape: int) -> Tensor:
        return (255 * (self.floats(*shape) + 0.5)).to(torch.uint8)


def _leaf(x: Tensor) -> Tensor:
    return x.float().detach().requires_grad_()


def _convolved(x: Tensor, filters: Tensor, bias: Tensor | None = None, padding: int = 1) -> Tensor:
    """x (N, H, W, C), filters (O, h, w, C) → (N, H', W', O)."""
    x, filters = x.permute(0, 3, 1, 2), filters.permute(0, 3, 1, 2)
    return F.conv2d(x, filters, bias, padding=padding).permute(0, 2, 3, 1)


def _pooled(x: Tensor) -> Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _gradients(y: Tensor, of_y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * of_y.float()).sum(), leaves, retain_graph=True)


def _kept(shape: torch.Size) -> Tensor:
    """What MASK multiplies the values of a map by."""
    key = torch.tensor(words(MASK.key), dtype=torch.int32, device="cpu")
    drawn = random_bytes(key, MASK.layer, shape.numel()).view(shape)
    return (drawn >= MASK.threshold).to(torch.float32) / 0.75


def _convolutions(kernels: Kernels, draws: _Draws) -> Pairs:
    filters, bias = draws.floats(19, 3, 3, 33), draws.floats(19)
    for images, height, width in ((3, 7, 6), (5, 2, 2)):  # the second by functions of their own
        x, of_y = draws.elements(images, height, width, 33), draws.elements(images, height, width, 19)
        leaf, leaf_filters = _leaf(x), _leaf(filters)
        y = _convolved(leaf, leaf_filters, bias)
        of_x, of_filters = _gradients(y, of_y, leaf, leaf_filters)
        yield kernels.forward(x, filters, bias, 1), y
        yield kernels.input_gradient(of_y, filters, 1, x.shape), of_x
        yield kernels.filter_gradient(x, of_y, 1).permute(0, 2, 3, 1), of_filters
    # Of so many tiles and channels the filters' gradient is computed in another way, position by position.
    x, of_y = (draws.elements(260, 3, 3, 128) for _ in range(2))
    leaf_filters = torch.zeros((128, 3, 3, 128), dtype=torch.float32, device="cpu", requires_grad=True)
    (of_filters,) = _gradients(_convolved(x.float(), leaf_filters), of_y, leaf_filters)
    yield kernels.filter_gradient(x, of_y, 1).permute(0, 2, 3, 1), of_filters


def _pooled_convolutions(kernels: Kernels, draws: _Draws) -> Pairs:
    """With ReLU and dropout behind the pooling."""
    x, filters, bias = draws.elements(3, 7, 6, 33), draws.floats(19, 3, 3, 33), draws.floats(19)
    leaf, leaf_filters = _leaf(x), _leaf(filters)
    whole = _convolved(leaf, leaf_filters, bias)
    y, picked = kernels.forward_pooled(x, filters, bias, 1, relu=True, mask=MASK)
    yield y, F.relu(_pooled(whole)) * _kept(y.shape)
    of_y = draws.elements(*y.shape)
    # The gradient as pooling and mask hand it back: that of a window at the pixel that was picked.
    spread = torch.zeros(whole.shape, dtype=torch.float32, device="cpu")
    places = (picked[..., None] == torch.arange(4, device="cpu")) * of_y[..., None].float() / 0.75
    spread[:, :6] = places.unflatten(-1, (2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    of_x, of_filters = _gradients(whole, spread, leaf, leaf_filters)
    pooling = picked, MASK.threshold
    yield kernels.input_gradient(of_y, filters, 1, x.shape, *pooling), of_x
    yield kernels.filter_gradient(x, of_y, 1, *pooling).permute(0, 2, 3, 1), of_filters
    yield kernels.channel_sums(of_y, *pooling), spread.sum((0, 1, 2))


def _convolutions_of_few_channels(kernels: Kernels, draws: _Draws) -> Pairs:
    x, filters, bias = draws.elements(3, 9, 6, 3), draws.floats(19, 3, 3, 3), draws.floats(19)
    leaf_filters = _leaf(filters)
    whole = _convolved(x.float(), leaf_filters, bias)
    y, _ = kernels.forward_directly(x, filters, bias, 1, pooled=False, relu=True)
    yield y, F.relu(whole)
    yield kernels.forward_directly(x, filters, bias, 1, pooled=True, relu=False)[0], _pooled(whole)
    of_y = draws.elements(3, 9, 6, 19)
    of_filters, of_bias = kernels.gradients_directly(x, of_y, 1, y, None)
    passed = of_y * (y > 0)
    yield of_filters.permute(0, 2, 3, 1), _gradients(whole, passed, leaf_filters)[0]
    yield of_bias, passed.float().sum((0, 1, 2))
    of_pixels = kernels.convolve_pixels(x.float(), filters.permute(1, 2, 3, 0).contiguous(), "gelu")
    yield of_pixels, F.gelu(_convolved(x.float(), filters, padding=0))


def _pooling_and_dropout(kernels: Kernels, draws: _Draws) -> Pairs:
    x, of_y = draws.elements(3, 7, 6, 33), draws.elements(3, 3, 3, 33)
    leaf, y = _leaf(x), kernels.max_pool(x, relu=True)
    yield y, F.relu(_pooled(leaf))
    yield kernels.max_pool_gradient(x, y, of_y, relu=True), _gradients(F.relu(_pooled(leaf)), of_y, leaf)[0]
    yield kernels.channel_sums(x), x.float().sum((0, 1, 2))
    yield kernels.drop(x, MASK), x.float() * _kept(x.shape)


def _normalisation(kernels: Kernels, draws: _Draws) -> Pairs:
    """With GELU, and with a residual sum and ReLU."""
    x, added, of_y = (draws.elements(3, 7, 6, 33) for _ in range(3))
    shift = draws.floats(33)
    leaf, leaf_added, leaf_shift = map(_leaf, (x, added, shift))
    even = F.batch_norm(leaf.permute(0, 3, 1, 2), None, None, None, leaf_shift, training=True, eps=1e-5)
    even = even.permute(0, 2, 3, 1)
    mean, variance = kernels.moments(x)
    normal = mean, (variance + 1e-5).rsqrt(), shift
    yield kernels.normalise(x, *normal, "gelu"), F.gelu(even)
    yield kernels.normalise_gradient(x, of_y, *normal, "gelu")[0], _gradients(F.gelu(even), of_y, leaf)[0]
    joined = F.relu(even + leaf_added)
    yield kernels.normalise(x, *normal, "relu", added), joined
    of_x, of_shift, of_added = kernels.normalise_gradient(x, of_y, *normal, "relu", added)
    assert of_added is not None
    yield from zip((of_x, of_shift, of_added), _gradients(joined, of_y, leaf, leaf_shift, leaf_added), strict=True)


def _optimizers(kernels: Kernels, draws: _Draws) -> Pairs:
    gradient, weights, momenta = draws.elements(5, 33), draws.floats(5, 33), draws.floats(5, 33)
    along = gradient.float() + 0.1 * weights
    moved = 0.9 * momenta + along, weights - 0.5 * (0.9 * (0.9 * momenta + along) + along)
    kernels.sgd_step(weights, gradient, momenta, 0.5, 0.9, 0.1, nesterov=True)
    yield from zip((momenta, weights), moved, strict=True)
    weights, means, squares = draws.floats(5, 33), draws.floats(5, 33), draws.floats(5, 33) + 0.5
    for (beta1, beta2), decoupled in (((0.9, 0.99), False), ((0.4, 0.9), True)):
        along = gradient.float() + (0 if decoupled else 0.1 * weights)
        new_means = beta1 * means + (1 - beta1) * along
        new_squares = beta2 * squares + (1 - beta2) * along**2
        root = (new_squares / (1 - beta2**3)).sqrt() + 0.1
        there = weights * (1 - 0.5 * 0.1 * decoupled) - 0.5 * new_means / (1 - beta1**3) / root
        kernels.adam_step(weights, gradient, means, squares, 3, 0.5, beta1, beta2, 0.1, 0.1, decoupled)
        yield from zip((means, squares, weights), (new_means, new_squares, there), strict=True)
    bank = draws.floats(19, 297)
    matrix = bank / bank.norm()
    for _ in range(2):
        square = matrix @ matrix.T
        matrix = 3 * matrix - 4 * square @ matrix + 2 * square @ square @ matrix
    yield kernels.orthogonalise(bank, (3.0, -4.0, 2.0), 2), matrix


def _pixels(kernels: Kernels, draws: _Draws) -> Pairs:
    """What computes in bytes and in float32 whatever the element, and so is held to more than its tolerance."""
    pixels, shift, scale = draws.bytes(3, 9, 6, 3), draws.floats(3), draws.floats(3)
    normalised = torch.allclose(kernels.normalise_pixels(pixels, shift, scale), (pixels.float() - shift) * scale)
    which, rows, columns = (
        torch.tensor(places, device="cpu") for places in ([2, 1], [[8, 0]] * 2, [[5, 5, 1], [2, 0, 3]])
    )
    there = pixels[which[:, None, None], rows[:, :, None], columns[:, None]]
    gathered = torch.equal(kernels.gather(pixels, which, rows, columns), there)
    whole = pixels.long()
    sums = torch.stack([whole.sum((0, 1, 2)), (whole**2).sum((0, 1, 2))])
    summed = torch.equal(kernels.byte_sums(pixels), sums)
    large = draws.floats(5000)
    large[4998] = -2.0
    within = [kernels.within(large[:count], limit) for count, limit in ((4998, 1.0), (4999, 1.0), (4999, 2.0))]
    said = torch.tensor([normalised, gathered, summed, *within], device="cpu")
    yield said, torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.float32, device="cpu")


CHECKS: tuple[Callable[[Kernels, _Draws], Pairs], ...] = (
    _convolutions,
    _pooled_convolutions,
    _convolutions_of_few_channels,
    _pooling_and_dropout,
    _normalisation,
    _optimizers,
    _pixels,
)
