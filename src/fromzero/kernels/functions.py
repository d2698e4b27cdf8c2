"""The kernels as functions that autograd differentiates, on images (N, C, H, W) in channels-last memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fromzero.kernels.interface import Kernels, Mask


class Convolve3x3(torch.autograd.Function):
    """`F.conv2d(x, weight, bias, padding=padding)` for 3×3 filters, by `kernels`; x and result are (N, C, H, W) in
    channels-last memory and of the kernels' element type, weight and bias float32. With `pooled` followed by
    `F.max_pool2d(…, 2)`, with `relu` too by that, and by dropout with `mask`: the map before them is never written, and
    no gradient of its size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: int,
        pooled: bool,
        relu: bool,
        mask: Mask | None,
        kernels: Kernels,
    ) -> Tensor:
        images = x.to(kernels.element).permute(0, 2, 3, 1).contiguous()
        filters = weight.float().permute(0, 2, 3, 1).contiguous()
        bias = None if bias is None else bias.float().contiguous()
        picked = None
        if pooled:
            y, picked = kernels.forward_pooled(images, filters, bias, padding, relu, mask)
        else:
            y = kernels.forward(images, filters, bias, padding)
        ctx.save_for_backward(images, filters, picked)
        ctx.padding, ctx.kernels, ctx.dtype = padding, kernels, x.dtype
        ctx.threshold = mask.threshold if mask else 0
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, filters, picked = ctx.saved_tensors
        kernels, padding, threshold = ctx.kernels, ctx.padding, ctx.threshold
        gradient = gradients[0].to(kernels.element).permute(0, 2, 3, 1).contiguous()
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_x = kernels.input_gradient(gradient, filters, padding, images.shape, picked, threshold)
            of_x = of_x.permute(0, 3, 1, 2).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = kernels.filter_gradient(images, gradient, padding, picked, threshold)
        if ctx.needs_input_grad[2]:
            of_bias = kernels.channel_sums(gradient, picked, threshold)
        return of_x, of_weight, of_bias, None, None, None, None, None


class ConvolveDirectly(torch.autograd.Function):
    """As Convolve3x3, of x with at most `kernels.DIRECT_CHANNELS` channels: `pooled` is followed by max pooling, and
    with `relu` the result is at least zero, pooled or not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: int,
        pooled: bool,
        relu: bool,
        kernels: Kernels,
    ) -> Tensor:
        images = x.to(kernels.element).permute(0, 2, 3, 1).contiguous()
        filters = weight.float().permute(0, 2, 3, 1).contiguous()
        bias = None if bias is None else bias.float().contiguous()
        y, picked = kernels.forward_directly(images, filters, bias, padding, pooled, relu)
        ctx.save_for_backward(images, filters, y if relu and not pooled else None, picked)
        ctx.padding, ctx.kernels, ctx.dtype = padding, kernels, x.dtype
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, filters, y, picked = ctx.saved_tensors
        kernels, padding = ctx.kernels, ctx.padding
        gradient = gradients[0].to(kernels.element).permute(0, 2, 3, 1).contiguous()
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:  # rare: nothing is trained before an image
            of_y = gradient if y is None else gradient * (y > 0)
            of_x = kernels.input_gradient(of_y, filters, padding, images.shape, picked)
            of_x = of_x.permute(0, 3, 1, 2).to(ctx.dtype)
        if any(ctx.needs_input_grad[1:3]):
            of_weight, of_bias = kernels.gradients_directly(images, gradient, padding, y, picked)
        return of_x, of_weight, of_bias if ctx.needs_input_grad[2] else None, None, None, None, None


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
    """`activation((x - mean) × scale + shift + other)` by `kernels`, mean and scale being x's own: batch normalisation
    in training. x, and `other` where there is one, (N, C, H, W) in channels-last memory and of the kernels' element
    type, the middle three float32 (C,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        other: Tensor | None,
        activation: str,
        kernels: Kernels,
    ) -> Tensor:
        images, others = x.permute(0, 2, 3, 1), None if other is None else other.permute(0, 2, 3, 1)
        ctx.save_for_backward(images, mean, scale, shift, others)
        ctx.activation, ctx.kernels = activation, kernels
        return kernels.normalise(images, mean, scale, shift, activation, others).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, mean, scale, shift, others = ctx.saved_tensors
        gradient = gradients[0].to(ctx.kernels.element).permute(0, 2, 3, 1).contiguous()
        given = (images, gradient, mean, scale, shift, ctx.activation, others)
        of_x, of_shift, of_other = ctx.kernels.normalise_gradient(*given)
        of_other = None if of_other is None else of_other.permute(0, 3, 1, 2)
        return of_x.permute(0, 3, 1, 2), None, None, of_shift, of_other, None, None


class Drop(torch.autograd.Function):
    """Dropout by `kernels`. What is kept is drawn again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, kernels: Kernels) -> Tensor:
        ctx.mask, ctx.kernels = mask, kernels
        return kernels.drop(x.contiguous(), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].to(ctx.kernels.element).contiguous()
        return ctx.kernels.drop(gradient, ctx.mask), None, None
