"""SGD and Adam by torch's own fused functions, without `torch.optim.Optimizer` around them.

Making one of torch's optimizer objects imports its compiler, which nothing here uses: more than a second at the start
of a run and half a second at its end. The update itself is torch's, called as its classes call it, or, where elements
are bfloat16, a kernel's: the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fromzero import kernels


class Optimizer(ABC):
    """Moves weights along their gradients. `param_groups` are dicts of `params` and the settings for them, which may
    be changed between steps; `state` holds the tensors that go with each weight. Both as in `torch.optim`."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]):
        """groups: dicts of `params` and the settings in which they differ from `defaults`."""
        self.param_groups: list[dict[str, Any]] = [defaults | group for group in groups]
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad_dtype = None  # gradients may come in any type: _move sees to it

    def gradients(self) -> list[Tensor]:
        """All gradients there are."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        return [weight.grad for weight in weights if weight.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._move(weights, [weight.grad for weight in weights], group)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    @abstractmethod
    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """One update of `weights` with the settings of their group."""


class SGD(Optimizer):
    """As `torch.optim.SGD(fused=True)`: momentum after Sutskever et al. (2013), weight decay in the gradient."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights if group["momentum"] else ():
            if not self.state[weight]:
                self.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
        buffers: list[Tensor | None] = [self.state[weight].get("momentum_buffer") for weight in weights]
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        kernel = kernels.in_use(weights[0])
        left: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for three in zip(*_in_memory_order(weights, gradients, buffers), strict=True):
            if kernel is not None and kernel.moves(*three):
                kernel.sgd_step(*three, **settings)
            else:
                left.append(three)
        if left:
            weights, gradients, buffers = map(list, zip(*left, strict=True))
            sgd(weights, typed(gradients, weights), buffers, fused=True, dampening=0.0, maximize=False, **settings)


class Adam(Optimizer):
    """As `torch.optim.Adam(fused=True)` (Kingma and Ba, 2015), weight decay in the gradient; `decoupled`: as `AdamW`
    (Loshchilov and Hutter, 2019)."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(groups, defaults)

    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        first, second, steps = (
            [self.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        settings = {
            "lr": group["lr"],
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled_weight_decay": group["decoupled"],
        }
        kernel = kernels.in_use(weights[0])
        left: list[tuple[Tensor, ...]] = []
        for *four, step in zip(*_in_memory_order(weights, gradients, first, second), steps, strict=True):
            weight, gradient, means, squares = four
            if kernel is not None and kernel.moves(*four):
                step += 1
                kernel.adam_step(weight, gradient, means, squares, int(step), **settings)
            else:
                left.append((*four, step))
        if left:
            weights, gradients, first, second, steps = map(list, zip(*left, strict=True))
            settings |= {"fused": True, "amsgrad": False, "maximize": False}
            adam(weights, typed(gradients, weights), first, second, [], steps, **settings)


def typed(gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The gradients in the types of their weights."""
    return [gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True)]


def _in_memory_order(*lists: list[Any]) -> list[list[Any]]:
    """The same tensors, those of filters in channels-last memory as views (O, H, W, I), which are contiguous: others
    torch copies before each update."""

    def views(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        present = [t for t in tensors if t is not None]
        if all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in present):
            return tuple(None if t is None else t.permute(0, 2, 3, 1) for t in tensors)
        return tensors

    return list(map(list, zip(*map(views, zip(*lists, strict=True)), strict=True)))
